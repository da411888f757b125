"""RILQ against aiha-lab/RILQ@42e2be2 main.py, run whole on a tiny decoder: loss, gradient, updates.

Their adapter is alpha/rank · x A B, ours x a b with b = alpha/rank · B; here A and B are trained.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lqec_jax import losses, train
from lqec_jax.core.types import ModelProblem, Windows, Work
from lqec_jax.recipe import parse_recipe
from tests.golden.authors.tiny_llama import FACTOR, LINEARS, add_adapters, stored_adapters

BATCH, UPDATES, RATE = 8, 3, 1e-3
# Before each update and after the last: mean((H_q - H)²), next-token loss, their half sum, of the
# file's validation windows. They stand here too for a reader; the tests take the file's.
VALIDATION = [(1.02562, 5.97094, 3.49828), (1.02135, 5.96851, 3.49493),
              (1.01930, 5.96156, 3.49043), (1.01767, 5.94745, 3.48256)]  # fmt: skip


@pytest.fixture(scope="module")
def stored(golden):
    return golden("rilq")


@pytest.fixture(scope="module")
def loss(llama):
    """Returns a function of adapters as the authors hold them, (A, B), and of a batch."""
    both = losses.ModelLoss((losses.Discrepancy(0.5), losses.NextToken(0.5)))

    def loss(params, batch) -> tuple:
        return both(llama.fns, add_adapters(params["student"], params["adapters"]), batch)

    return loss


@pytest.fixture(scope="module")
def update(loss):
    return train.make_update(loss, optax.adam(RATE))


@pytest.fixture(scope="module")
def read(llama):
    """Returns a reader of batches: windows and the teacher's last hidden states after the norm."""
    _, after = llama.hidden(llama.teacher, llama.tokens)
    return lambda numbers: {"tokens": llama.tokens[numbers], "answers": after[numbers]}


def begin(llama, *, zero: bool = False) -> dict:
    adapters = {
        path: (jnp.asarray(a), jnp.zeros_like(b) if zero else jnp.asarray(b))
        for path, (a, b) in llama.adapters.items()
    }
    return {"student": llama.student, "adapters": adapters}


def is_adapter(path: tuple, _) -> bool:
    return path[0].key == "adapters"


def test_loss_and_gradient_of_one_window_are_theirs(llama, stored, loss, read):
    params = begin(llama)
    batch = read(stored["windows_train"][:1])

    def of_adapters(adapters):
        return loss({**params, "adapters": adapters}, batch)

    evaluate = jax.jit(jax.value_and_grad(of_adapters, has_aux=True))
    (total, terms), gradients = evaluate(params["adapters"])
    came = [terms["discrepancy"], terms["next_token"], total]
    np.testing.assert_allclose(came, stored["micro.loss.f64"], rtol=1e-5)
    for path, halves in stored_adapters(stored, "micro.grad.").items():
        for ours, theirs in zip(gradients[path], halves, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=3e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("prefix", ["", "zeroB."])
def test_three_updates_end_where_theirs_do(llama, stored, loss, update, read, prefix):
    state = train.init_state(begin(llama, zero=bool(prefix)), optax.adam(RATE), is_adapter)
    order = stored["windows_train"].reshape(UPDATES, BATCH)
    theirs = stored[f"{prefix}train_losses.f64"].reshape(UPDATES, BATCH, 3).mean(axis=1)
    for numbers, (discrepancy, token_loss, eighth) in zip(order, theirs, strict=True):
        state, metrics = update(state, read(numbers))
        assert float(metrics["discrepancy"]) == pytest.approx(discrepancy, rel=2e-5)
        assert float(metrics["next_token"]) == pytest.approx(token_loss, rel=2e-5)
        # Their total is divided by the windows of an update, before they are summed.
        assert float(metrics["loss"]) == pytest.approx(BATCH * eighth, rel=2e-5)
    if not prefix:
        after, _ = loss(state.params, read(stored["windows_val"]))
        assert float(after) == pytest.approx(stored["val_losses.f64"][UPDATES, 2], rel=2e-5)
    for path, halves in stored_adapters(stored, f"{prefix}after{UPDATES}.").items():
        for ours, wanted in zip(state.train["adapters"][path], halves, strict=True):
            # Adam's first steps have the size of the rate, whatever the gradient: 1 % of one.
            np.testing.assert_allclose(ours, wanted, atol=0.01 * RATE)


def test_the_step_takes_the_update_that_their_program_takes(llama, stored):
    """One update of all training windows: their order, which our key draws, does not matter."""
    recipe = (
        f"rilq(alpha=16.0, lr={RATE}, updates=1, batch={BATCH}, eval_every=1, patience=0, "
        "decay='constant', weight_decay=0.0, dtype='float32')"
    )
    (step,) = parse_recipe(recipe).steps
    windows = llama.tokens[stored["windows_train"][:BATCH]], llama.tokens[stored["windows_val"]]
    text = Windows(np.concatenate(windows), BATCH)
    teacher, _ = llama.hidden(llama.teacher, text.tokens)
    student = add_adapters(llama.student, llama.adapters)
    work = Work(jax.random.key(0))
    solution = step.run(ModelProblem(llama.fns, student, text, work, teacher))
    came = [point.val_loss for point in solution.history]
    np.testing.assert_allclose(came, stored["val_losses.f64"][:2, 2], rtol=2e-5)
    assert solution.best_update == 1


def test_the_curve_here_is_the_files(stored):
    np.testing.assert_allclose(VALIDATION, stored["val_losses.f64"], atol=1e-5)
    assert len(LINEARS) == 7 and FACTOR == 4
