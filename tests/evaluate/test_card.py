"""README.md of an artifact: front matter that the hub accepts, and only known facts."""

import pytest
import yaml

from lqec_jax.errors import InputError
from lqec_jax.evaluate.card import (
    check_drawn,
    describe_base,
    read_front_matter,
    render_card,
    render_pages,
    say_failure,
)
from lqec_jax.evaluate.page import render_report

STAGES = [
    {"name": name, "ppl": ppl, "low": ppl - 1, "high": ppl + 1, "nll": 1.0, "tokens": 9,
     "protocol": "calib-val/64", "seconds": 1.0}
    for name, ppl in (("teacher", 2.5), ("rtn | svd", 4.0))
]  # fmt: skip
REPORT = {
    "base": {"name": "Llama", "hub_id": "someone/Llama", "license": "llama2"},
    "recipe": "rtn(bits=2, group_size=32) | svd(rank=4) | rilq(rank=4)",
    "seed": 3,
    "bits_per_weight": 2.9680,
    "stages": STAGES,
    "skipped": [{"path": "embed", "reason": "kept as it came"}],
}


def front_of(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    return read_front_matter(tmp_path / "README.md")


def test_front_matter_says_what_is_known(tmp_path):
    assert front_of(render_card(REPORT), tmp_path) == {
        "library_name": "lqec_jax",
        "pipeline_tag": "text-generation",
        "base_model": "someone/Llama",
        "base_model_relation": "quantized",
        "license": "llama2",
        "tags": ["lqec", "jax", "quantized", "rtn", "svd", "rilq"],
    }


def test_front_matter_guesses_nothing(tmp_path):
    front = front_of(render_card({**REPORT, "base": {"name": "model"}}), tmp_path)
    assert set(front) == {"library_name", "pipeline_tag", "tags"}
    assert front_of(render_card({}), tmp_path)["tags"] == ["lqec", "jax", "quantized"]


def test_the_hubs_own_reader_accepts_the_card(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "README.md").write_text(render_card(REPORT))
    card = hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/Llama" and card.data.license == "llama2"
    assert card.data.library_name == "lqec_jax"
    hub.utils.validate_repo_id(card.data.base_model)
    assert card.text.lstrip().startswith("# Llama at 2.97 bits per weight")


def test_a_card_says_what_was_measured_under_its_protocol():
    text = render_card(REPORT)
    assert "| after | perplexity, `calib-val/64` | 95% interval |\n|---|---|---|\n" in text
    assert "| teacher | 2.500 | 1.500 to 3.500 |\n" in text
    assert "| rtn \\| svd | 4.000 | 3.000 to 5.000 |\n" in text
    assert REPORT["recipe"] in text and "lqec.load(" in text and "`embed`: kept as it came" in text
    assert text == render_card(REPORT) and text.endswith("\n")


def test_a_card_stays_the_same_however_long_the_run_took():
    slow = [{**stage, "seconds": 99.0} for stage in STAGES]
    assert render_card({**REPORT, "stages": slow, "seconds": 9.0, "peak_rss_mb": 1.0}) == (
        render_card(REPORT)
    )


def test_a_folder_of_the_hubs_cache_knows_its_id(tmp_path):
    folder = tmp_path / "models--someone--tiny-llama" / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# Tiny\n")
    base = describe_base(folder)
    assert base == {"name": "tiny-llama", "hub_id": "someone/tiny-llama", "license": "mit"}
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert describe_base(link) == base


def test_any_other_folder_gives_its_own_name_and_no_place(tmp_path):
    (tmp_path / "mine").mkdir()
    assert describe_base(tmp_path / "mine") == {"name": "mine"}
    assert describe_base(None) == {}


@pytest.mark.parametrize(
    "text", ["", "# no front matter", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nopen"]
)
def test_a_damaged_card_teaches_nothing(tmp_path, text):
    assert front_of(text, tmp_path) == {}


def test_names_of_strangers_are_shown_and_do_nothing():
    strange = "<script>alert(1)</script>`[x](y)\n# &lt;|a|"
    stages = [STAGES[0] | {"name": strange, "protocol": strange}]
    recipe = f"rtn\n```\n{strange}\n````"
    skipped = [{"path": strange, "reason": strange}]
    changes = {"recipe": recipe, "stages": stages, "skipped": skipped}
    for base in ({"name": strange}, {"name": strange, "hub_id": f"{strange}/{strange}"}):
        head, _, rest = render_card(REPORT | changes | {"base": base}).partition("\n---\n")
        before, fenced, after = rest.partition(f"`````\n{recipe}\n`````")
        assert fenced  # the recipe's own fences do not end the one around it
        shown = before + after
        for mark in ("<script", "`[", "[x]", "&lt;", "|a|", "\n# &#38;"):
            assert mark not in shown, mark
        assert shown.count("&#60;script&#62;alert(1)") >= 5
        assert yaml.safe_load(head.removeprefix("---\n")).get("base_model") == base.get("hub_id")


def test_strange_text_survives_in_the_front_matter(tmp_path):
    base = {"name": "a: b # c", "hub_id": "a/b", "license": "other", "license_name": "yes: no"}
    front = front_of(render_card({**REPORT, "base": base}), tmp_path)
    assert front["license_name"] == "yes: no"
    assert yaml.safe_load(yaml.safe_dump(front)) == front


def test_the_pages_of_a_report_are_its_page_and_its_card():
    wanted = {"report.html": render_report(REPORT), "README.md": render_card(REPORT)}
    assert render_pages(REPORT) == wanted


def test_a_training_on_examples_is_told_from_one_on_the_calibration_text():
    fits = [{"method": "rilq"}, {"method": "finetune", "data": {"file": "rows.jsonl"}}]
    told = " ".join(render_card({**REPORT, "fits": fits}).split())
    assert "There `finetune` stands for a training on the rows of `rows.jsonl`, not on" in told
    assert "not on a calibration text" not in render_card({**REPORT, "fits": fits[:1]})


def test_a_report_that_cannot_be_drawn_costs_nobody_the_weights(tmp_path, caplog):
    broken = {**REPORT, "fits": [{"method": "rilq", "history": [], "best_update": 0}]}
    assert set(render_pages(REPORT)) == {"report.html", "README.md"}
    assert "report.html" not in render_pages(broken)
    assert "could not be written (IndexError" in caplog.text
    check_drawn(REPORT, tmp_path)
    with pytest.raises(InputError, match=r"report\.json is damaged \(IndexError"):
        check_drawn(broken, tmp_path)


def test_a_page_that_cannot_be_made_is_said_and_the_others_are_made():
    said = []
    # The page wants a number where the card writes whatever there is.
    pages = render_pages({**REPORT, "seconds": "x", "stages": [5]}, said.append)
    assert len(pages) + len(said) == 2 and said
    assert all("could not be written" in line and "all else is" in line for line in said)
    assert "\n" not in "".join(said)


def test_only_a_pages_own_fault_is_forgiven():
    for error in (OSError("full"), KeyboardInterrupt(), InputError("no matplotlib")):
        with pytest.raises(type(error)), say_failure("page", print):
            raise error
