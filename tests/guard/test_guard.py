"""What a dozen recipes write, to the bit: a change of the sources changes nothing, or says why.

Hashes of one machine say nothing on another: there, and with another jax, rows are skipped, and
`python -m tests.guard.record`, run at a commit that is trusted, adds them.
"""

import pytest

from tests.guard.record import HASHES, ROWS, Runner, describe_environment, read_hashes, spell_steps

# "row/file" -> why it may differ from what was recorded. Its new hash is kept beside the old one by
# `python -m tests.guard.record --allowed "row/file"`.
TUNED = (
    "a fine-tuning's report names its rows, counts those with a BOS or an EOS of their own, and "
    "calls the error of a weight that it trained the error before"
)
ORDER = "statistics of inputs are summed in one order, whatever threads there are"
ALLOWED: dict[str, str] = {
    "tiny caldera/model.safetensors": ORDER,
    "tiny caldera/report.json": ORDER,
    "tiny e8p/report.json": ORDER,
    "tiny gptq_rilq/report.json": ORDER,
    "tiny slim/report.json": ORDER,
}
ALLOWED |= {"tiny tuned/report.json": TUNED, "demo tuned/report.json": TUNED}
# Each compiles for ten seconds, and trains nothing.
SLOW = {"tiny e8p", "tiny caldera"}

KEPT = read_hashes()
HERE = describe_environment()


def mark(row: str):
    slow = row in SLOW or row.startswith("demo")
    return pytest.param(row, marks=[pytest.mark.slow] if slow else [])


@pytest.fixture(scope="module")
def runner(request, tmp_path_factory):
    cached = hasattr(request.config, "cache")
    cache = request.config.cache.mkdir("jax-guard") if cached else None
    runner = Runner(tmp_path_factory.mktemp("guard"), cache)
    yield runner
    runner.close()


@pytest.mark.parametrize("row", [mark(row) for row in ROWS])
def test_a_row_writes_what_it_wrote(row, request):
    recorded = KEPT["runs"].get(HERE, {}).get(row)
    if recorded is None:
        pytest.skip(f"{row}: no hashes of this machine and its packages ({HERE}); at a commit that "
                    "is trusted, `python -m tests.guard.record` adds them")  # fmt: skip
    new = KEPT["allowed"].get(HERE, {})
    wanted = {file: new.get(f"{row}/{file}", known) for file, known in recorded.items()}
    came = request.getfixturevalue("runner").run(row)
    differ = [file for file in wanted | came if wanted.get(file) != came.get(file)]
    assert not differ, f"{row}: not what {HASHES.name} has; compare with a commit that is trusted"


def test_steps_are_spelled_as_they_were():
    # They are in fingerprints and reports: an unfinished run and an artifact must find their own.
    now = spell_steps()
    assert {text: now.get(text) for text in KEPT["steps"]} == KEPT["steps"]


def test_what_may_change_says_why_and_has_its_hash():
    for place, reason in ALLOWED.items():
        assert place.partition("/")[0] in ROWS and reason.strip(), place
    for here, changed in KEPT["allowed"].items():
        assert set(changed) == (set(ALLOWED) if changed else set()), here
        for place, new in changed.items():
            row, _, file = place.partition("/")
            assert KEPT["runs"][here][row][file] != new, f"{place} is what it was: allow it no more"
