"""`lqec export` and `lqec verify`: what they print, and their exit codes."""

import json

import pytest

import lqec_jax as lqec
from lqec_jax.cli import main
from tests.io.packed_models import make_model


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return lqec.save(make_model(), tmp_path_factory.mktemp("cli") / "artifact")


def run(capsys, *arguments):
    code = main([str(word) for word in arguments])
    return code, *capsys.readouterr()


def test_a_base_and_its_adapter_go_out_and_come_back(artifact, tmp_path, capsys):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    code, out, _ = run(capsys, "export", artifact, base, "--format", "gptq", "--base-only",
                       "--gptq-version", "2")  # fmt: skip
    assert code == 0 and out.splitlines()[-1].startswith("gptq, ")
    assert out.splitlines()[-1].endswith(f"written to {base}")
    code, _, _ = run(capsys, "export", artifact, adapter, "--format", "peft", "--base", base)
    assert code == 0
    said = json.loads((adapter / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(base)
    for folder in (base, adapter):
        code, out, err = run(capsys, "verify", folder)
        assert (code, err) == (0, "")
        assert "21 weights " in out and "logits differ by at most" in out
        assert folder == adapter or "21 weights equal to the bit" in out


def test_the_numbers_as_json(artifact, tmp_path, capsys):
    run(capsys, "export", artifact, tmp_path / "out", "--format", "hf", "--dtype", "bfloat16")
    code, out, _ = run(capsys, "verify", tmp_path / "out", "--against", artifact, "--json")
    found = json.loads(out)
    assert code == 0 and found["weights"] == 21 and found["format"] == "hf"
    assert 0 < found["weight_difference"] < 0.02 < 1 < found["largest_logit"]


def test_one_flipped_bit_is_exit_code_3_and_one_line(artifact, tmp_path, capsys):
    run(capsys, "export", artifact, tmp_path / "out", "--format", "flax")
    path = tmp_path / "out" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)
    code, out, err = run(capsys, "verify", tmp_path / "out")
    assert (code, out) == (3, "")
    assert err.startswith(f"error: {tmp_path}/out: model.safetensors is not the file that was")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("export", "{artifact}", "{out}", "--format", "gguf"), "format 'gguf' is unknown"),
        (("export", "{artifact}", "{out}", "--format", "gptq"), "add --base-only and export"),
        (("export", "{artifact}", "{artifact}", "--format", "hf"), "replaces nothing"),
        (("export", "{artifact}", "{out}"), "Missing option '--format'"),
        (("verify", "{artifact}/.."), "has no lqec_export.json"),
        (("verify", "{artifact}", "--against", "demo"), "leave out --against"),
        (("export", "{artifact}", "{out}", "--format", "hf", "--check", "x"), "check='x'; one of"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_line(arguments, why, artifact, tmp_path, capsys):
    words = [word.format(artifact=artifact, out=tmp_path / "out") for word in arguments]
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "") and why in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
