"""`lqec eval`: its numbers are Python's, its rows name their protocol, its JSON is whole."""

import json

import numpy as np
import pytest
import tokenizers

import lqec_jax as lqec
from lqec_jax.cli import main
from tests.golden.tiny_checkpoint import RTN, SEQLEN, make_tokens, write_checkpoint

WINDOWS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a tokenizer of 64 words, w0 as BOS, a second model, and three texts."""
    folder = tmp_path_factory.mktemp("eval")
    write_checkpoint(folder / "model", num_hidden_layers=2)
    write_checkpoint(folder / "other", num_hidden_layers=2, seed=1)
    words = {f"w{number}": number for number in range(64)}
    model = tokenizers.models.WordLevel(words, unk_token="w1")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "tokenizer_config.json").write_text('{"bos_token": "w0"}')
    tokens = make_tokens(WINDOWS + 1)[: WINDOWS * SEQLEN + 9]
    np.save(folder / "text.npy", tokens)
    rows = [{"text": " ".join(f"w{t}" for t in part)} for part in np.array_split(tokens, 7)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluate(folder, capfd, *more, text="text.npy", model="model"):
    words = ["eval", folder / model, "--text", folder / text, "--seqlen", SEQLEN, *more]
    assert main([str(word) for word in words]) == 0
    return capfd.readouterr()


def test_the_numbers_are_those_of_python(folder, capfd):
    row = json.loads(evaluate(folder, capfd, "--json").out)
    tokens = np.load(folder / "text.npy")
    score = lqec.perplexity(lqec.load(folder / "model"), tokens, seqlen=SEQLEN)
    for name in ("ppl", "nll", "low", "high", "tokens", "windows", "protocol"):
        assert row[name] == getattr(score, name), name
    assert row["tokens"] == WINDOWS * (SEQLEN - 1)
    assert row["protocol"] == "tokens/32"
    assert row["environment"]["compute_dtype"] == "float32"
    assert row["against"] is None and "kl" not in row


def test_texts_with_a_bos_of_their_own_are_counted(folder, capfd):
    rows = [json.loads(line) for line in (folder / "text.jsonl").read_text().splitlines()]
    own = [{"text": f"w0 {row['text']}"} for row in rows[:3]] + rows[3:]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    plain = json.loads(evaluate(folder, capfd, "--json", text="text.jsonl").out)
    row = json.loads(evaluate(folder, capfd, "--json", text="own.jsonl").out)
    assert row["ppl"] == plain["ppl"] and "notes" not in plain
    (note,) = row["notes"]
    assert note == "own.jsonl: 3 of 7 documents bring their own BOS; none gets a second"
    assert evaluate(folder, capfd, text="own.jsonl").out.splitlines()[1] == note


def test_a_person_reads_the_same(folder, capfd):
    row = json.loads(evaluate(folder, capfd, "--json").out)
    out, err = evaluate(folder, capfd)
    assert out == (
        f"perplexity {row['ppl']:.4f} (95% interval {row['low']:.4f} - {row['high']:.4f}) over "
        "155 tokens in 5 windows, protocol tokens/32\n"
    )
    assert err == "perplexity: 0/5\nperplexity: 5/5\n"
    assert evaluate(folder, capfd, "--quiet").err == ""


def test_fewer_windows_are_the_first_ones(folder, capfd):
    row = json.loads(evaluate(folder, capfd, "--windows", 2, "--json").out)
    tokens = np.load(folder / "text.npy")[: 2 * SEQLEN]
    score = lqec.perplexity(lqec.load(folder / "model"), tokens, seqlen=SEQLEN)
    assert (row["windows"], row["ppl"]) == (2, score.ppl)


def test_a_model_is_at_no_distance_from_itself_and_at_some_from_another(folder, capfd):
    itself = json.loads(evaluate(folder, capfd, "--against", folder / "model", "--json").out)
    assert itself["kl"] == pytest.approx(0.0, abs=1e-6) and itself["top1"] == 1.0
    other = json.loads(evaluate(folder, capfd, "--against", folder / "other", "--json").out)
    assert other["kl"] > 0.5 and other["top1"] < 0.5
    assert other["ppl"] == itself["ppl"]
    out = evaluate(folder, capfd, "--against", folder / "other").out.splitlines()[1]
    assert f"KL {other['kl']:.6f} nats per token" in out
    assert f"at {other['top1']:.4f} of the tokens" in out


def test_two_protocols_make_two_texts_and_are_named(folder, capfd):
    documents = json.loads(evaluate(folder, capfd, "--json", text="text.jsonl").out)
    joined = json.loads(
        evaluate(folder, capfd, "--protocol", "gptq", "--json", text="text.jsonl").out
    )
    assert documents["protocol"] == "documents/32" and joined["protocol"] == "gptq/32"
    tokens = np.load(folder / "text.npy")
    model = lqec.load(folder / "model")
    parts = [np.concatenate([[0], part]) for part in np.array_split(tokens, 7)]
    # A BOS before each document; or one before all of them, and newlines are no words here.
    for row, stream in ((documents, np.concatenate(parts)), (joined, np.append(0, tokens))):
        score = lqec.perplexity(model, stream, seqlen=SEQLEN)
        assert (row["ppl"], row["windows"]) == (score.ppl, score.windows)


def test_a_compressed_model_is_scored_with_its_recipe(folder, capfd):
    tokens = np.load(folder / "text.npy")
    small = lqec.compress(folder / "model", RTN, tokens, seqlen=SEQLEN)
    lqec.save(small, folder / "small")
    file = folder / "row.json"
    out, _ = evaluate(folder, capfd, "--json", file, "--against", folder / "model", model="small",
                      text="text.jsonl")  # fmt: skip
    row = json.loads(file.read_text())
    assert row["recipe"].startswith("rtn(bits=3, group_size=32")
    assert f"perplexity {row['ppl']:.4f}" in out
    assert 0.01 < row["kl"] < 5 and 0 < row["top1"] < 1
    assert row["protocol"] == "documents/32"  # the artifact carries the tokenizer on


def test_half_precision_is_another_number_and_says_so(folder, capfd):
    exact = json.loads(evaluate(folder, capfd, "--json").out)
    rough = json.loads(evaluate(folder, capfd, "--dtype", "bfloat16", "--json").out)
    assert rough["environment"]["compute_dtype"] == "bfloat16"
    assert rough["ppl"] != exact["ppl"]
    assert rough["ppl"] == pytest.approx(exact["ppl"], rel=0.1)


def test_a_changed_tokenizer_is_named_on_both_sides(folder, capsys, tmp_path):
    small = lqec.compress(folder / "model", RTN, np.load(folder / "text.npy"), seqlen=SEQLEN)
    lqec.save(small, tmp_path / "one")
    words = ["eval", "--text", str(folder / "text.jsonl"), "--seqlen", str(SEQLEN)]
    raw = json.loads((tmp_path / "one" / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["w2"], vocabulary["w3"] = 3, 2
    (tmp_path / "one" / "tokenizer.json").write_text(json.dumps(raw))
    for more in (["one"], [str(folder / "model"), "--against", "one"]):
        named = [str(tmp_path / word) if word == "one" else word for word in more]
        assert main([*words, *named]) == 2
        assert "tokenizer.json is not as written" in capsys.readouterr().err
        assert main([*words, *named, "--check", "none", "--quiet"]) == 0
        out = capsys.readouterr().out
        assert ("has another tokenizer (tokenizer.json)" in out) == ("--against" in more)
