"""A student is kept in memory where this process made it, and read where another one did."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.tree import equal_trees, stack_blocks
from lqec_jax.runs.folder import Run
from lqec_jax.runs.student import Student
from lqec_kernels.formats import Affine, CompressedLinear, LowRank

TEACHER = {"embed": {"embedding": jnp.ones((5, 4))}, "norm": {"scale": jnp.ones(4)}}


def make_block(seed, rank=1):
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, (4, 32), np.uint32)
    scales, a, b = (
        rng.random(shape).astype(np.float16) for shape in ((2, 32), (64, rank), (rank, 32))
    )
    leaf = CompressedLinear(Affine(words, scales, None, 2, 32, 64), (LowRank(a, b),))
    return {"attn": {"q": {"kernel": leaf}}, "norm": {"scale": np.ones(4, np.float32)}}


@pytest.fixture
def run(tmp_path):
    return Run.begin(tmp_path / "out", {}, resume=False, overwrite=False)


def again(run):
    return Student(Run.begin(run.out, {}, resume=True, overwrite=False), TEACHER, 2)


def refuse(*_):
    pytest.fail("a block was read or written")


def test_what_was_made_here_is_not_read_back(run, monkeypatch):
    student = Student(run, TEACHER, 2)
    blocks = [make_block(seed) for seed in range(2)]
    for layer, block in enumerate(blocks):
        student.put_block(0, layer, block)
    monkeypatch.setattr(Run, "load_block", refuse)
    whole = student.whole(0)
    assert equal_trees(whole, {**TEACHER, "blocks": stack_blocks(blocks)})
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(student.block(0, 1)))


def test_another_process_reads_the_same_bits(run):
    student = Student(run, TEACHER, 2)
    for layer in range(2):
        student.put_block(0, layer, make_block(layer, rank=layer + 1))
    later = again(run)
    assert equal_trees(later.whole(0), student.whole(0))
    # In the middle of the next phase one block is new here, and both are there as they were.
    later.put_block(1, 0, make_block(7))
    assert equal_trees(later.block(1, 0), make_block(7))
    assert equal_trees(later.block(0, 0), make_block(0))
    assert equal_trees(later.block(0, 1), make_block(1, rank=2))


def test_a_whole_student_is_written_unless_it_is_the_last(run):
    student = Student(run, TEACHER, 2)
    params = {**TEACHER, "blocks": stack_blocks([make_block(0), make_block(1)])}
    blocks = student.put(1, params, write=True)
    assert len(blocks) == 2 and equal_trees(blocks[1], make_block(1))
    assert {path.name for path in (run.folder / "phase-1").glob("*.safetensors")} == {
        "block-0.safetensors", "block-1.safetensors"}  # fmt: skip
    assert student.trained_outer(1) is None and student.outer(1) is TEACHER
    trained = {**TEACHER, "norm": {"scale": 2 * jnp.ones(4)}}
    student.put(2, {**trained, "blocks": params["blocks"]}, write=False)
    assert not (run.folder / "phase-2").exists()
    assert equal_trees(student.whole(2), {**trained, "blocks": params["blocks"]})
    assert student.trained_outer(1) is None and equal_trees(student.trained_outer(2), trained)


def test_an_outer_part_that_was_trained_stays_until_another_is(run):
    student = Student(run, TEACHER, 1)
    trained = {**TEACHER, "norm": {"scale": 2 * jnp.ones(4)}}
    student.put(1, {**trained, "blocks": stack_blocks([make_block(0)])}, write=True)
    for one in (student, again(run)):
        assert one.trained_outer(0) is None
        assert equal_trees(one.outer(1), trained) and equal_trees(one.outer(3), trained)


def test_a_run_without_a_name_writes_nothing(monkeypatch):
    run = Run.begin(None, {}, resume=False, overwrite=False)
    for name in ("save_block", "save_outer", "load_block"):
        monkeypatch.setattr(Run, name, refuse)
    student = Student(run, TEACHER, 1)
    trained = {"embed": TEACHER["embed"], "norm": {"scale": jnp.zeros(4)}}
    student.put_block(0, 0, make_block(0))
    student.put(1, {**trained, "blocks": stack_blocks([make_block(1)])}, write=True)
    assert equal_trees(student.block(1, 0), make_block(1))
    run.discard()
