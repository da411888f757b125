"""`lqec generate`: what it prints is what Python returns, as it comes, and its JSON is whole."""

import json

import pytest
import tokenizers

import lqec_jax as lqec
from lqec_jax.cli import generate as module
from lqec_jax.cli import main
from tests.golden.tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("generate") / "m", num_hidden_layers=2)
    words = {f"w{number}": number for number in range(64)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    return folder


def run(folder, capfd, *more):
    assert main(["generate", str(folder), "--prompt", "w5 w6", *map(str, more)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out


def test_the_text_is_that_of_python(folder, capfd):
    text = lqec.generate(lqec.load(folder), "w5 w6", max_new_tokens=7)
    assert run(folder, capfd, "--max-new-tokens", 7) == text + "\n"
    # Its template is the bare message, and the tokenizer has no BOS: the same prompt.
    assert run(folder, capfd, "--max-new-tokens", 7, "--chat") == text + "\n"


def test_json_says_what_made_the_text(folder, capfd):
    options = {"max_new_tokens": 7, "temperature": 1.25, "top_p": 0.75, "seed": 3}
    words = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", v)]
    row = json.loads(run(folder, capfd, *words, "--json"))
    text = lqec.generate(lqec.load(folder), "w5 w6", **options)
    facts = {"model": str(folder), "recipe": "", "prompt": "w5 w6", "chat": False}
    assert row == facts | options | {"text": text}
    file = folder / "row.json"
    assert run(folder, capfd, *words, "--json", file) == text + "\n"
    assert json.loads(file.read_text()) == row


def test_pieces_are_printed_when_they_come_and_cannot_drive_a_terminal(capfd):
    printed = []

    def pieces():
        for piece in ("a\n", "\x1b[31mb", "\tç"):
            yield piece
            printed.append(capfd.readouterr().out)

    assert module._print_stream(pieces()) == "a\n\x1b[31mb\tç"
    assert printed == ["a\n", "\N{REPLACEMENT CHARACTER}[31mb", "\tç"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--prompt", "w5", "--top-p", "2"], "error: generate: top_p=2.0; a number from 0 to 1"),
        (["--prompt", "w5 " * 70], "error: generate: the prompt has 70 tokens; at most 63"),
        (["--prompt", "w5", "--json", "no/such/file"], "error: --json no/such/file cannot be"),
        ([], "error: Missing option '--prompt'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, capfd, more, line):
    assert main(["generate", str(folder), *more]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1
