"""Distances of logits against their definitions, and the bound of KL against what it bounds."""

import numpy as np
import pytest

from lqec_jax.io.verify.distance import bound_kl, measure


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_the_numbers_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((3, 5, 7)).astype(np.float32) for _ in range(2))
    found = measure(a, b)
    p, q = softmax(a.astype(np.float64)), softmax(b.astype(np.float64))
    assert found.kl == pytest.approx((p * np.log(p / q)).sum() / 15, rel=1e-9)
    apart = np.sort(np.abs(a - b).ravel())
    assert found.largest == apart[-1] and found.median == pytest.approx(apart[52])
    assert np.count_nonzero(apart <= found.most_of_them) >= 103
    assert measure(a, a) == (0.0, 0.0, 0.0, 0.0)
    assert measure(a, a + 3).kl == pytest.approx(0.0, abs=1e-6)  # predicts the same
    assert f"KL {found.kl:.3g} nats a token" in found.in_words


def test_what_is_no_number_is_at_no_distance():
    a = np.zeros((2, 3), np.float32)
    b = np.array([[0, np.nan, 0], [0, 0, 0]], np.float32)
    assert np.isnan(measure(a, b).kl) and np.isnan(measure(a, b).largest)


@pytest.mark.parametrize("difference", [0.01, 0.3, 2.0])
def test_no_differences_of_a_size_make_a_larger_kl_than_its_bound(difference):
    rng = np.random.default_rng(1)
    worst = 0.0
    for scale in (0.1, 1, 5):
        a = scale * rng.standard_normal((200, 4))
        b = a + difference * rng.choice([-1.0, 1.0], a.shape)
        worst = max(worst, *(measure(x[None], y[None]).kl for x, y in zip(a, b, strict=True)))
    assert worst <= bound_kl(difference)
    assert worst > 0.5 * bound_kl(difference) or difference > 1  # and it is no idle bound
