"""Tables for people are not cut or coloured by what they hold; JSON for programs is strict."""

import json

import pytest

from lqec_jax.cli import printing
from lqec_jax.errors import InputError


def test_a_table_in_a_log_is_whole_and_takes_words_as_they_are(capsys):
    long = "rtn(bits=2, group_size=32) + low_rank(rank=16) " * 2
    printing.print_table(("name", "[bold]size"), [("[red]a[/red] :smile:", 1), (long, 23)], right=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "[bold]size"]
    assert lines[1].startswith("[red]a[/red] :smile:") and lines[1].endswith(" 1")
    assert lines[2].startswith(long.strip()) and lines[2].endswith("23")
    assert len({len(line) for line in lines}) == 1


def test_a_long_line_stays_one_line(capsys):
    printing.print_line("word " * 100 + "[dim]")
    assert capsys.readouterr().out == "word " * 100 + "[dim]\n"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.50 kB (1500 bytes)"),
        (2_500_000, "2.50 MB (2500000 bytes)"),
        (13_476_839_424, "13.48 GB (13476839424 bytes)"),
    ],
)
def test_sizes_are_readable_and_exact(count, text):
    assert printing.format_bytes(count) == text
    assert printing.format_size(count) == text.partition(" (")[0]


def test_a_number_that_was_not_finite_says_so():
    assert printing.format_number(3.14159) == "3.1416"
    assert printing.format_number(3.14159, 6) == "3.141590"
    assert printing.format_number(None) == "not finite"


def test_json_goes_where_it_was_sent(tmp_path, capsys):
    value = {"a": [1, 2.5, None], "b": "ü"}
    printing.write_json("-", value)
    assert json.loads(capsys.readouterr().out) == value
    printing.write_json(str(tmp_path / "r.json"), value)
    assert json.loads((tmp_path / "r.json").read_text()) == value
    assert capsys.readouterr().out == ""


def test_json_never_holds_what_json_cannot_say():
    with pytest.raises(ValueError, match="not JSON compliant"):
        printing.write_json("-", {"ppl": float("nan")})


def test_a_place_that_cannot_be_written_is_refused_before_work(tmp_path):
    (tmp_path / "file").write_text("")
    for good in (None, "-", str(tmp_path / "new.json"), str(tmp_path / "file")):
        printing.check_json(good)
    for bad in (tmp_path, tmp_path / "no" / "r.json", tmp_path / "file" / "r.json"):
        with pytest.raises(InputError, match="cannot be written"):
            printing.check_json(str(bad))
