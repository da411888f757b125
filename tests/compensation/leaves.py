"""Two leaves that two programs made of one computation."""

import jax
import jax.numpy as jnp
import numpy as np


def assert_same_but_last_places(came, wanted) -> None:
    """Compares trees: structure and integers exactly, floats to what rounding leaves.

    Programs that are compiled apart may fuse and sum in another order. That moves eigenvectors by
    some roundoffs over the gaps of their spectrum, which two last places of float16 hide; a factor
    that is stored so may land on the neighbour of its number.
    """
    assert jax.tree.structure(came) == jax.tree.structure(wanted)
    for c, w in zip(jax.tree.leaves(came), jax.tree.leaves(wanted), strict=True):
        assert (c.shape, c.dtype) == (w.shape, w.dtype)
        if not jnp.issubdtype(c.dtype, jnp.floating):
            np.testing.assert_array_equal(c, w)
            continue
        c, w = np.asarray(c, np.float64), np.asarray(w, np.float64)
        last = 2 * float(jnp.finfo(jnp.float16).eps)
        np.testing.assert_allclose(c, w, rtol=last, atol=last * np.abs(w).max())
