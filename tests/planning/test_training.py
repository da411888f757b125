"""What a plan reads of a step's schedule: windows, looks, parts of a batch."""

import pytest

from lqec_jax.methods import METHODS
from lqec_jax.planning.training import Training, read_training
from lqec_jax.recipe import parse_recipe

TRAINED = [name for name, row in METHODS.items() if row.scope != "linear"]


def read(text: str) -> Training:
    (step,) = parse_recipe(text).steps
    return read_training(step)


def test_updates_walk_a_batch_each():
    training = read("rilq(updates=100, batch=4, eval_every=30, accumulate=2)")
    assert training.count_windows(256) == 400
    assert training.count_looks(256) == 4  # one before the first
    assert training.count_at_once(512, "gpu") == 2
    whole = read("rilq(updates=100, batch=4)")
    assert (whole.count_at_once(512, "gpu"), whole.count_at_once(512, "cpu")) == (4, 1)


def test_epochs_walk_all_windows():
    training = read("omniquant(epochs=3, batch=4)")
    assert (training.count_windows(256), training.count_looks(256)) == (768, 4)
    assert not training.on_moments


def test_a_training_on_moments_walks_no_window():
    training = read("apiq(scope='linear', epochs=7, updates=90)")
    assert training.on_moments and training.schedule.updates == 90
    assert not read("apiq(scope='block', epochs=7, updates=90)").on_moments
    assert not read("rilq(scope='linear')").on_moments


@pytest.mark.parametrize("name", TRAINED)
def test_every_training_can_be_read(name):
    training = read(f"{name}()")
    assert training.schedule.batch >= 1 and training.count_windows(256) >= 1
    assert training.count_looks(256) > 1
