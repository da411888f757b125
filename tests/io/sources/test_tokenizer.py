"""Tokenizers: the ids of the real files, special tokens from every place they hide, chat."""

import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import tokenizers

from lqec_jax.errors import InputError, MissingExtra
from lqec_jax.io.sources.tokenizer import Tokenizer

SHARED = Path(__file__).parents[4] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent")
WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


def write_folder(folder, tokenizer_config=None, special_map=None, config=None):
    """A word tokenizer that, like Llama's, would add BOS on its own if it were let."""
    folder.mkdir(exist_ok=True)
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, "<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast.decoder = tokenizers.decoders.Fuse()
    fast.add_special_tokens(["<s>", "</s>"])
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    fast.save(str(folder / "tokenizer.json"))
    files = {
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": special_map,
        "config.json": config,
    }
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def refusal(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_special_token_is_added_unasked(tmp_path):
    folder = write_folder(tmp_path, {"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("a b z") == [3, 4, 0]
    assert tokenizer.encode("a b", bos=True) == [1, 3, 4]
    assert tokenizer.encode("") == [] and tokenizer.encode("", bos=True) == [1]
    # A text that brings its own gets no second.
    assert tokenizer.encode("<s> a <s>") == [1, 3, 1]
    assert tokenizer.encode("<s><s> a <s>", bos=True) == [1, 3, 1]
    assert tokenizer.decode([1, 3, 4, 2]) == "ab"
    assert tokenizer.vocab_size == 6


def test_saved_truncation_and_padding_do_not_touch_the_text(tmp_path):
    folder = write_folder(tmp_path, {"bos_token": "<s>"})
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.enable_truncation(2)
    fast.enable_padding(length=8)
    fast.save(str(folder / "tokenizer.json"))
    assert Tokenizer.load(folder).encode("a b c a b c") == [3, 4, 5, 3, 4, 5]


def test_vocab_size_covers_ids_beyond_a_gap(tmp_path):
    folder = write_folder(tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"]["far"] = 40
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("far") == [40] and tokenizer.vocab_size == 41


@pytest.mark.parametrize(
    ("tokenizer_config", "special_map", "config", "bos", "eos"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, None, None, 1, 2),
        ({"bos_token": {"content": "<s>", "lstrip": False}}, None, None, 1, None),
        (None, {"bos_token": "<s>", "eos_token": {"content": "</s>"}}, None, 1, 2),
        ({"bos_token": "b"}, {"bos_token": "<s>", "eos_token": "</s>"}, None, 4, 2),
        ({"add_bos_token": True}, None, {"bos_token_id": 1, "eos_token_id": [2, 5]}, 1, 2),
        # A null is an answer: this tokenizer has no BOS, whatever config.json carries along.
        ({"bos_token": None}, None, {"bos_token_id": 1}, None, None),
        (None, None, None, None, None),
        (None, None, {"bos_token_id": None, "eos_token_id": []}, None, None),
    ],
)
def test_where_bos_and_eos_come_from(tmp_path, tokenizer_config, special_map, config, bos, eos):
    tokenizer = Tokenizer.load(write_folder(tmp_path, tokenizer_config, special_map, config))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)


@pytest.mark.parametrize(
    ("own", "config", "generation", "ends"),
    [
        ({"eos_token": "</s>"}, {"eos_token_id": 4}, {"eos_token_id": [3, 5]}, {2, 3, 4, 5}),
        ({"eos_token": "</s>"}, None, {"eos_token_id": 5}, {2, 5}),
        ({"eos_token": None}, {"eos_token_id": [3, 4]}, {"eos_token_id": None}, {3, 4}),
        (None, {"eos_token_id": -1}, {"max_new_tokens": 3}, set()),
        (None, None, None, set()),
    ],
)
def test_all_files_say_what_ends_a_text(tmp_path, own, config, generation, ends):
    folder = write_folder(tmp_path, own, config=config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert Tokenizer.load(folder).end_ids == ends


@pytest.mark.parametrize("value", ["2", True, [1, [2]], {"a": 1}, 2.0, 2**31])
def test_ends_that_are_no_ids_are_refused_by_name(tmp_path, value):
    for name in ("config.json", "generation_config.json"):
        folder = write_folder(tmp_path / name)
        (folder / name).write_text(json.dumps({"eos_token_id": value}))
        assert f"{folder / name}: eos_token_id is" in refusal(Tokenizer.load, folder)


def test_bos_that_is_not_there(tmp_path):
    message = refusal(Tokenizer.load(write_folder(tmp_path)).encode, "a", bos=True)
    assert "has no BOS" in message
    folder = write_folder(tmp_path, {"bos_token": "<begin>"})
    assert "bos_token '<begin>' is not in the tokenizer's vocabulary" in refusal(
        Tokenizer.load, folder
    )


def test_broken_or_missing_files(tmp_path):
    assert "has no tokenizer.json" in refusal(Tokenizer.load, tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0",\n "model": ')
    assert f"{path}, line 2: not JSON" in refusal(Tokenizer.load, tmp_path)
    path.write_text('{"version": "1.0", "model": {"type": "None"}}')
    assert f"{path}: not a tokenizer" in refusal(Tokenizer.load, tmp_path)
    write_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json, line 1: not JSON" in refusal(Tokenizer.load, tmp_path)


def test_files_are_those_of_the_tokenizer_only(tmp_path):
    folder = write_folder(tmp_path, {"bos_token": "<s>"}, config={"vocab_size": 6})
    (folder / "tokenizer.model").write_bytes(b"")
    names = [path.name for path in Tokenizer.load(folder).files()]
    assert names == ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"]
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in Tokenizer.load(folder).files():
        shutil.copy(path, copy)
    assert Tokenizer.load(copy).encode("c b a", bos=True) == [1, 5, 4, 3]


def test_older_files_without_the_extra(monkeypatch, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra) as caught:
        Tokenizer.load(tmp_path)
    assert "lqec-jax[hf]" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parity
def test_older_files_go_through_transformers(tmp_path):
    pytest.importorskip("transformers")
    vocab = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3, "\u0120": 4, "\u0120ab": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n\u0120 ab\n", encoding="utf-8")
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    config = {"tokenizer_class": "GPT2Tokenizer", **special}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("ab ab", bos=True) == [3, 2, 5]
    assert tokenizer.decode([3, 2, 5]) == "ab ab"
    assert tokenizer.vocab_size == 6


def test_older_files_that_transformers_cannot_read(monkeypatch, tmp_path):
    class AutoTokenizer:
        @staticmethod
        def from_pretrained(folder, local_files_only):
            raise ValueError("`sentencepiece`\nis required")

    fake = types.ModuleType("transformers")
    fake.AutoTokenizer = AutoTokenizer
    monkeypatch.setitem(sys.modules, "transformers", fake)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    message = refusal(Tokenizer.load, tmp_path)
    assert "(`sentencepiece` is required)" in message and str(tmp_path) in message


# --- chat


def test_chat_from_each_place_a_template_lies(tmp_path):
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": CHAT}]
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    messages = [{"role": "user", "content": "<b>&é"}, {"role": "assistant", "content": "a"}]
    wanted = "<user><b>&é</s><assistant>a</s>"
    for template in (CHAT, named):
        folder = write_folder(tmp_path, special | {"chat_template": template})
        assert Tokenizer.load(folder).chat(messages) == wanted
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}only this", encoding="utf-8")
    assert Tokenizer.load(tmp_path).chat(messages) == "<s>only this"


def test_chat_templates_find_what_they_are_written_for(tmp_path):
    template = (
        "{% if tools is not none %}T{% endif %}\n"
        "{% for m in messages %}\n"
        "{% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endfor %}\n"
        "{{ {'q': '<é>'} | tojson }}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    tokenizer = Tokenizer.load(write_folder(tmp_path, {"chat_template": template}))
    messages = [{"role": "system", "content": "no"}, {"role": "user", "content": "hi"}]
    assert tokenizer.chat(messages) == 'hi{"q": "<é>"}>'
    assert tokenizer.chat(messages, reply=False) == 'hi{"q": "<é>"}'


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "(roles must alternate)"),
        ("{% if %}", "Expected an expression"),
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{{ 'a' + 1 }}", "can only concatenate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_that_fails_is_one_line(tmp_path, template, said):
    tokenizer = Tokenizer.load(write_folder(tmp_path, {"chat_template": template}))
    message = refusal(tokenizer.chat, [{"role": "user", "content": "a"}])
    assert said in message and str(tmp_path) in message


def test_templates_without_a_name_and_text_that_is_none(tmp_path):
    named = [{"name": ["default"], "template": "no"}, 3, {"name": "default", "template": "yes"}]
    tokenizer = Tokenizer.load(write_folder(tmp_path, {"chat_template": named}))
    assert tokenizer.chat([{"role": "user", "content": "a"}]) == "yes"
    assert "half a surrogate pair at character 2" in refusal(tokenizer.encode, "a \ud800")


def test_no_template_or_no_role(tmp_path):
    tokenizer = Tokenizer.load(write_folder(tmp_path))
    messages = [{"role": "user", "content": "a"}]
    assert "has no chat template" in refusal(tokenizer.chat, messages)
    assert "message 1" in refusal(tokenizer.chat, [*messages, {"content": "a"}])
    assert "message 0" in refusal(tokenizer.chat, ["hi"])


# --- the real files


def read_stories(name):
    lines = (SHARED / "data" / name).read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["text"] for line in lines if line]


def collapse(text):
    """What both models' tokenizer.model does to a text, and their tokenizer.json forgot."""
    return re.sub(" {2,}", " ", text).strip(" ")


@needs_shared
@pytest.mark.parametrize(("model", "vocab"), [("babyllama", 105), ("xs279k", 512)])
def test_real_text_round_trips(model, vocab):
    tokenizer = Tokenizer.load(SHARED / "models" / model)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, vocab)
    for story in read_stories("tinystories_dev.jsonl"):
        ids = tokenizer.encode(story, bos=True)
        assert ids[0] == 1 and 0 <= min(ids) and max(ids) < vocab
        assert tokenizer.decode(ids) == collapse(story)


@needs_shared
def test_bytes_outside_the_vocabulary_round_trip_where_the_model_has_bytes():
    tokenizer = Tokenizer.load(SHARED / "models" / "xs279k")
    text = "naïve ☃ 雪\n\ttab  two spaces"
    assert tokenizer.decode(tokenizer.encode(text)) == collapse(text)


@needs_shared
@pytest.mark.parity
@pytest.mark.parametrize("model", ["babyllama", "xs279k"])
def test_ids_are_those_of_transformers_but_for_runs_of_spaces(model):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(SHARED / "models" / model)
    ours = Tokenizer.load(SHARED / "models" / model)
    for text in read_stories("c4_sample.jsonl")[:50]:
        assert ours.encode(text) == theirs.encode(collapse(text), add_special_tokens=False)
