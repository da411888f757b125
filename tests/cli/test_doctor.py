"""`lqec doctor`: what is installed, what is known to clash, and an exit code that says so."""

import pytest

from lqec_jax.cli import doctor as doctor_module
from lqec_jax.cli import main
from lqec_jax.cli.doctor import describe_packages, find_bad_pairs, find_version, parse_version

GOOD = {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}


def test_a_working_environment_passes_and_is_shown(capsys):
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    for package in ("jax", "flax", "optax", "numpy", "safetensors"):
        assert any(
            line.split()[:2] == [package, find_version(package)] for line in out.splitlines()
        )
    assert "(cpu)" in out and "everything that is needed works" in out
    assert err == ""


@pytest.mark.parametrize(
    ("changes", "python", "words"),
    [
        ({}, (3, 11, 7), []),
        ({"jax": "0.11.0"}, (3, 12, 0), []),
        ({"jax": "0.11.1"}, (3, 12, 0), ["flax.nnx"]),
        ({"jax": "0.11.2", "flax": "0.12.12"}, (3, 12, 0), []),
        ({"flax": "0.12.12"}, (3, 12, 0), ["upgrade jax"]),
        ({"jax": "0.11.0"}, (3, 11, 9), ["Python 3.11"]),
        ({"jax": "0.12.0.dev1", "flax": "0.12.8"}, (3, 11, 9), ["flax.nnx", "Python 3.11"]),
        ({"flax": None}, (3, 11, 9), []),
    ],
)
def test_pairs_that_are_known_to_clash_are_named(changes, python, words):
    pairs = find_bad_pairs(GOOD | changes, python)
    assert len(pairs) == len(words)
    assert all(word in pair.text for word, pair in zip(words, pairs, strict=True))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0.11.2", (0, 11, 2)), ("0.10.2rc1", (0, 10, 2)), ("2.13.0+cpu", (2, 13, 0)),
     ("1.0.dev3", (1, 0)), ("0.12.8", (0, 12, 8))],
)  # fmt: skip
def test_versions_are_compared_as_numbers(text, numbers):
    assert parse_version(text) == numbers


def test_an_optional_package_is_named_with_what_installs_it():
    rows = {row[0]: row[1:] for row in describe_packages({"jax": None, "pyarrow": None})}
    assert rows["pyarrow"] == (
        "-",
        "optional, for texts in .parquet: pip install 'lqec-jax[parquet]'",
    )
    assert rows["jax"] == ("-", "needed")


def test_a_package_that_is_missing_fails_the_check(monkeypatch, capsys):
    real = find_version
    monkeypatch.setattr(
        doctor_module, "find_version", lambda name: None if name == "optax" else real(name)
    )
    assert main(["doctor"]) == 3
    assert capsys.readouterr().err == "error: doctor: optax is not installed\n"


def test_a_package_that_does_not_import_fails_the_check(monkeypatch, capsys):
    monkeypatch.setattr(doctor_module, "MODULES", ("jax", "no_such_module"))
    assert main(["doctor"]) == 3
    err = capsys.readouterr().err
    assert err.startswith("error: doctor: import no_such_module: ModuleNotFoundError")
    assert err.count("\n") == 1


def test_jax_without_a_device_fails_the_check(monkeypatch, capsys):
    import jax

    def fail():
        raise RuntimeError("Unable to initialize backend 'tpu':\nno device")

    monkeypatch.setattr(jax, "devices", fail)
    assert main(["doctor"]) == 3
    err = capsys.readouterr().err
    assert "jax finds no device: Unable to initialize backend 'tpu': no device" in err
