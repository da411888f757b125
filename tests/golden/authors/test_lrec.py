"""LREC against stochasticai/xTuring@7ea38e0 quant_utils/lrec.py (INT2.1) on a tiny decoder.

KL is summed over positions and divided by windows, the next-token loss is a mean over tokens; Adam
with coupled decay. The adapters are PEFT's, see `test_rilq` for their factor.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax import losses
from lqec_jax.core.types import ModelProblem, Windows, Work
from lqec_jax.recipe import parse_recipe
from tests.golden.authors.tiny_llama import add_adapters, stored_adapters

BATCH, WEIGHT = 2, 200.0


@pytest.fixture(scope="module")
def stored(golden):
    return golden("lrec")


def test_loss_and_gradient_of_the_first_batch_are_theirs(llama, stored):
    tokens = llama.tokens[:BATCH]
    _, teacher = llama.hidden(llama.teacher, tokens)

    def loss(adapters, kl_weight, token_weight):
        student = add_adapters(llama.student, adapters)
        return losses.lrec(llama.fns, teacher, student, tokens,
                           kl_weight=kl_weight, token_weight=token_weight)  # fmt: skip

    adapters = jax.tree.map(jnp.asarray, llama.adapters)
    evaluate = jax.jit(jax.value_and_grad(loss))
    came = [evaluate(adapters, *weights)[0] for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, WEIGHT))]
    np.testing.assert_allclose(came, stored["losses.f64"][0], rtol=1e-5)
    _, gradients = evaluate(adapters, 1.0, WEIGHT)
    for path, halves in stored_adapters(stored, "batch0.grad.").items():
        for ours, theirs in zip(gradients[path], halves, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=5e-5 * np.abs(theirs).max())


def test_the_step_takes_the_update_that_their_program_takes(llama, stored):
    """Its first batch is all there is to train on; its second is what is looked at."""
    recipe = (
        f"lrec(alpha=16.0, lr=3e-4, updates=1, batch={BATCH}, weight_decay=1e-5, coupled=True, "
        f"decay='constant', patience=0, eval_every=1, token_weight={WEIGHT}, dtype='float32')"
    )
    (step,) = parse_recipe(recipe).steps
    windows = llama.tokens[:BATCH], llama.tokens[BATCH : 2 * BATCH]
    text = Windows(np.concatenate(windows), BATCH)
    teacher, _ = llama.hidden(llama.teacher, text.tokens)
    student = add_adapters(llama.student, llama.adapters)
    work = Work(jax.random.key(0))
    solution = step.run(ModelProblem(llama.fns, student, text, work, teacher))
    before, after = (point.val_loss for point in solution.history)
    assert after == pytest.approx(stored["losses.f64"][1, 2], rel=2e-5)
    assert after < before
