"""How far logits lie from others: KL of what they predict, and how their differences are spread."""

from typing import NamedTuple

import numpy as np


class Distance(NamedTuple):
    """Of logits `other` from `logits`, [..., vocab] both.

    Attributes:
      kl: mean KL(softmax(logits) || softmax(other)), nats a token.
      median, most_of_them, largest: of the absolute differences: half, and 99 of 100, are no
        larger; none is.
    """

    kl: float
    median: float
    most_of_them: float
    largest: float

    @property
    def in_words(self) -> str:
        return (
            f"KL {self.kl:.3g} nats a token; half of the logits by {self.median:.2g} or less, 99% "
            f"by {self.most_of_them:.2g}, none by more than {self.largest:.2g}"
        )


def measure(logits: np.ndarray, other: np.ndarray) -> Distance:
    """Compares two arrays of logits; a NaN on either side makes every number one."""
    apart = np.abs(logits - other)
    p, q = _log_softmax(logits), _log_softmax(other)
    kl = float((np.exp(p) * (p - q)).sum(-1).mean())
    median, most = np.quantile(apart, (0.5, 0.99))
    return Distance(max(kl, 0.0) if np.isfinite(kl) else kl, float(median), float(most),
                    float(apart.max()))  # fmt: skip


def bound_kl(difference: float) -> float:
    """Returns the most that KL can be where no logit differs by more than `difference`.

    log p - log q then lies within a range of R = 2 difference, and by Hoeffding's lemma
    KL(p || q) <= R^2 / 8.
    """
    return difference**2 / 2


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
