"""The decoder of the authors' trainings is ours: transformers' LlamaForCausalLM, two layers."""

import numpy as np
import pytest

from lqec_jax import losses
from lqec_kernels.formats import CompressedLinear
from tests.golden.authors.problems import distance
from tests.golden.authors.tiny_llama import LAYERS, LINEARS, add_adapters


def test_hidden_states_are_theirs(llama):
    _, after = llama.hidden(llama.teacher, llama.tokens[:1])
    np.testing.assert_allclose(after[0], llama.stored["fp_last_hidden.window0"], atol=5e-5)


def test_the_next_token_loss_is_theirs(llama):
    tokens = llama.tokens[:2]
    _, after = llama.hidden(llama.teacher, tokens)
    came = losses.rilq(llama.fns, after, llama.teacher, tokens, model_weight=0.0, token_weight=1.0)
    assert float(came) == pytest.approx(float(llama.stored["fp_ce.windows0_1"]), rel=1e-5)


def test_the_student_is_two_layers_of_packed_weights_near_the_teachers(llama):
    student = add_adapters(llama.student, llama.adapters)
    for path in LINEARS:
        group, name = path.split("/")
        leaf = student["blocks"][0][group][name]["kernel"]
        whole = llama.teacher["blocks"][0][group][name]["kernel"]
        assert isinstance(leaf, CompressedLinear) and leaf.stack_shape == (LAYERS,)
        # Two bits in groups of 32 leave so much.
        assert 0.3 < distance(leaf.base.dense(), whole) < 0.6
