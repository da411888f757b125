"""Windows walk together as far as their tokens allow, by one program a model."""

import jax
import numpy as np
import pytest

from lqec_jax.core.walking import STREAM_TOKENS, compile_block, compile_embed, cut_rows
from tests.train.tiny import draw_plain, plain_fns


@pytest.mark.parametrize("count, length", [(0, 8), (1, 8), (7, 2048), (3, 2 * STREAM_TOKENS)])
def test_every_window_walks_once_with_as_many_as_fit(count, length):
    rows = cut_rows(count, length)
    assert [i for some in rows for i in range(count)[some]] == list(range(count))
    sizes = [some.stop - some.start for some in rows]
    assert all(size == 1 or size * length <= STREAM_TOKENS for size in sizes)
    assert len(rows) == -(-count // max(1, STREAM_TOKENS // length))


def test_a_model_is_compiled_once():
    fns, params = plain_fns(), draw_plain((2,), 32)
    tokens = np.arange(16).reshape(2, 8)
    assert compile_embed(fns) is compile_embed(fns) and compile_block(fns) is compile_block(fns)
    h = compile_embed(fns)(params, tokens)
    np.testing.assert_array_equal(h, fns.embed(params, tokens))
    block = jax.tree.map(lambda leaf: leaf[0], params["blocks"][0])
    np.testing.assert_allclose(compile_block(fns)(block, h), fns.block(block, h)[0], rtol=1e-6)
