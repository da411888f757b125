"""Training state goes to disk and comes back bit for bit, onto the devices it is wanted on."""

import errno
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lqec_jax.errors import InputError
from lqec_jax.runs import checkpoints
from lqec_jax.runs.checkpoints import Checkpoints

DTYPES = (jnp.float32, jnp.float16, jnp.bfloat16, jnp.uint32, jnp.int32)


def make_state(seed=0):
    keys = jax.random.split(jax.random.key(seed), len(DTYPES))
    arrays = {
        jnp.dtype(dtype).name: (1000 * jax.random.normal(key, (8, 3))).astype(dtype)
        for key, dtype in zip(keys, DTYPES, strict=True)
    }
    return {"params": arrays, "moments": (arrays["float32"] / 3, jnp.asarray(seed + 7))}


def zeros_like(state):
    return jax.tree.map(jnp.zeros_like, state)


def check_same_bits(came, state):
    assert jax.tree.structure(came) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(came), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def opened(tmp_path):
    """Opens the folder as often as asked and closes what is still open."""
    made = []

    def open_folder():
        made.append(Checkpoints(tmp_path / "training"))
        return made[-1]

    yield open_folder
    for one in made:
        one.close()


def test_an_empty_folder_has_no_state(opened):
    assert opened().restore(make_state()) is None


def test_the_newest_state_comes_back_bit_for_bit(opened):
    first = opened()
    facts = {"seconds": 1.5, "history": [[0, None, 2.25]], "best": 3}
    first.save(5, make_state(5), {"best": 0})
    first.save(12, make_state(12), facts)
    first.close()
    arrays, said = opened().restore(zeros_like(make_state()))
    check_same_bits(arrays, make_state(12))
    assert said == facts


def test_arrays_may_be_consumed_as_soon_as_they_are_handed_over(opened):
    first, state = opened(), make_state(1)
    whole = jax.tree.map(lambda array: np.array(array), state)
    first.save(1, state, {})
    for array in jax.tree.leaves(state):
        array.delete()
    first.close()
    check_same_bits(opened().restore(zeros_like(make_state()))[0], whole)


def test_arrays_are_placed_like_what_they_are_to_replace(opened):
    first, state = opened(), make_state(2)
    first.save(1, state, {})
    first.close()
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    wanted = jax.tree.map(
        lambda array: jax.device_put(jnp.zeros_like(array), rows if array.ndim else everywhere),
        state,
    )
    arrays, _ = opened().restore(wanted)
    check_same_bits(arrays, state)
    for came, like in zip(jax.tree.leaves(arrays), jax.tree.leaves(wanted), strict=True):
        assert came.sharding == like.sharding


def damage(path):
    """Flips one bit in the middle."""
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def restore_once(folder):
    """Opens, restores and closes, so that nothing of it outlives the call."""
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(zeros_like(make_state()))
    except InputError as error:
        return str(error)
    finally:
        checkpoints.close()


# Where reading fails, Orbax leaves coroutines that nobody awaits.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_a_damaged_state_is_refused_by_name_with_a_way_out(opened, tmp_path):
    first = opened()
    first.save(5, make_state(5), {"best": 0})
    first.close()
    folder, refused = tmp_path / "training", 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        # The middle of a file; what Orbax does not read may be anything, what it reads may not.
        for change in (lambda path=path: damage(path), lambda path=path: path.write_bytes(b"")):
            change()
            came = restore_once(folder)
            if isinstance(came, str):
                assert "\n" not in came and "--resume" in came and str(folder) in came
                refused += 1
            elif came is not None:  # otherwise it is no state any more, and training begins anew
                check_same_bits(came[0], make_state(5))
                assert came[1] == {"best": 0}
            path.write_bytes(data)
    assert refused > 2
    gc.collect()  # what was left behind is of this test


def test_other_numbers_in_whole_files_are_noticed(opened, monkeypatch):
    first = opened()
    monkeypatch.setattr(checkpoints, "_digest", lambda *_: "0" * 64)
    first.save(5, make_state(5), {"best": 0})
    first.close()
    monkeypatch.undo()
    with pytest.raises(InputError, match="5, a training's state, is damaged: it is not as it was"):
        opened().restore(zeros_like(make_state()))


def test_a_full_disk_is_an_error_of_the_disk_whoever_noticed_it(opened, monkeypatch):
    first = opened()

    def refuse(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device")

    monkeypatch.setattr(type(first._manager), "save", refuse)
    with pytest.raises(OSError) as said:
        first.save(1, make_state(1), {})
    assert said.value.errno == errno.ENOSPC and said.value.filename.endswith("training")

    def fail(*_, **__):
        raise ValueError("our fault")

    monkeypatch.setattr(type(first._manager), "save", fail)
    with pytest.raises(ValueError, match="our fault"):
        first.save(1, make_state(1), {})
