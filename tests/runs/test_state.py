"""state.json: what it holds comes back, and what it cannot hold is refused by name."""

import json

import pytest

from lqec_jax.errors import InputError
from lqec_jax.runs.state import DIGEST, FACTS, STATE, has_digest, read_state, write_state

FILE = {"bytes": 3, "sha256": "a" * 64}
STREAM = {"slot": 1, "bytes": 10, "cut": 4, "sums": ["b" * 64] * 3}
STATE_OF_A_RUN = {
    "fingerprint": {"recipe": "rtn(bits=2)", "seed": 0},
    "phase": 1,
    "blocks": 3,
    "phase_seconds": 0.1 + 0.2,
    "linears": {"blocks/0/attn/q": {"bits_per_weight": 2.5, "steps": []}},
    "fits": [{"phase": 0, "history": []}],
    "stages": [{"phase": 0, "name": "teacher", "seconds": 0.0, "ppl": float("nan")}],
    "fisher": True,
    "artifact": False,
    "files": {"phase-0/block-0.json": FILE},
    "streams": {"student": STREAM},
}


def rewrite(folder, **changes):
    """Changes facts as an editor does, and leaves the digest out as an older version did."""
    (folder / STATE).write_text(json.dumps(STATE_OF_A_RUN | changes))


def test_a_state_comes_back_as_it_was(tmp_path):
    write_state(tmp_path, STATE_OF_A_RUN)
    came = read_state(tmp_path)
    assert json.dumps(came) == json.dumps(STATE_OF_A_RUN)
    assert set(STATE_OF_A_RUN) == set(FACTS) and has_digest(tmp_path)


@pytest.mark.parametrize(("before", "after"), [('"blocks": 3', '"blocks": 1'), ("2.5", "2.25"),
                                               ('"teacher"', '"teaches"')])  # fmt: skip
def test_no_edited_fact_is_believed(tmp_path, before, after):
    write_state(tmp_path, STATE_OF_A_RUN)
    text = (tmp_path / STATE).read_text()
    assert text.count(before) == 1
    (tmp_path / STATE).write_text(text.replace(before, after))
    with pytest.raises(InputError, match="damaged: it is not as the run wrote it"):
        read_state(tmp_path)


def test_a_state_of_before_digests_is_read(tmp_path):
    rewrite(tmp_path)
    assert not has_digest(tmp_path) and DIGEST not in read_state(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("phase", -1), ("phase", True), ("phase", 1.0), ("blocks", "3"), ("blocks", None),
        ("phase_seconds", "x"), ("phase_seconds", -1.0), ("phase_seconds", float("inf")),
        ("fingerprint", []), ("linears", []), ("linears", {"a": 1}),
        ("linears", {"a": {"steps": 1}}),
        ("fits", {}), ("fits", [{}]), ("stages", [{"phase": 0, "name": "x"}]), ("fisher", 1),
        ("artifact", "yes"), ("files", {"a": {}}), ("files", {"a": FILE | {"bytes": -1}}),
        ("streams", {"a": STREAM | {"slot": 2}}), ("streams", {"a": STREAM | {"cut": 0}}),
        ("streams", {"a": STREAM | {"sums": ["b" * 64]}}),
    ],
)  # fmt: skip
def test_a_fact_of_another_kind_is_named(tmp_path, name, value):
    rewrite(tmp_path, **{name: value})
    with pytest.raises(InputError, match=rf"state.json is damaged: {name} is .* was wanted"):
        read_state(tmp_path)


def test_an_unknown_fact_and_a_missing_one_are_named(tmp_path):
    rewrite(tmp_path, blocs=3)
    with pytest.raises(InputError, match="'blocs' is no fact of a run"):
        read_state(tmp_path)
    (tmp_path / STATE).write_text('{"fingerprint": {}, "phase": 0}')
    with pytest.raises(InputError, match="damaged: blocks is missing"):
        read_state(tmp_path)
