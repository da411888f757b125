"""What a run reads: texts turned into windows, to calibrate on and to score on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lqec_jax.calibration.data import cut_windows, load_tokens, split_windows
from lqec_jax.core.arguments import check_int, check_tokens
from lqec_jax.errors import InputError
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.model import Model


@dataclass(frozen=True)
class Text:
    """The windows of a run, int32 [n, T] each.

    Stages are measured on `held_out`, or on the validation windows where it is empty. `notes` is
    what is to be said of the texts.
    """

    train: np.ndarray
    val: np.ndarray
    held_out: np.ndarray
    protocol: str
    notes: tuple[str, ...] = ()

    @property
    def windows(self) -> np.ndarray:
        return np.concatenate([self.train, self.val, self.held_out])

    @property
    def score(self) -> np.ndarray:
        """Returns the windows that stages are measured on: always the last of `windows`."""
        return self.held_out if len(self.held_out) else self.val

    @property
    def seqlen(self) -> int:
        """Returns how many tokens a window has."""
        return self.train.shape[1]


def read_windows(
    model: Model,
    text: str | Path,
    seqlen: int,
    windows: int | None = None,
    protocol: str = "documents",
    note: Callable[[str], None] | None = None,
) -> tuple[np.ndarray, str]:
    """Reads a text to score a model on.

    Args:
      windows: the first so many; all of them unless given.
      protocol: how documents become windows, see `calibration.data`.
      note: is told what is to be said of the text, in one line.
    Returns:
      Windows int32 [n, seqlen], and the protocol, 'tokens' where the text is token ids already.
    """
    _check_seqlen(model.config, seqlen)
    if windows is not None:
        check_int("eval", "windows", windows, 1)
    limit = None if windows is None else windows * seqlen
    tokens = load_tokens(text, model.tokenizer, protocol, seqlen=seqlen, limit=limit, note=note)
    return make_windows(model.config, tokens, seqlen, windows), name_protocol(text, protocol)


def make_windows(
    config: ModelConfig, tokens: Any, seqlen: int, windows: int | None = None
) -> np.ndarray:
    """Cuts tokens for a model, after checking that it can read them."""
    tokens = np.asarray(tokens)
    _check_seqlen(config, seqlen)
    if tokens.dtype.kind not in "iu" or not (
        tokens.ndim == 1 or (tokens.ndim == 2 and tokens.shape[1] == seqlen)
    ):
        raise InputError(
            f"tokens are {tokens.dtype} {list(tokens.shape)}; integers [n] or [n, {seqlen}] were "
            "wanted"
        )
    tokens = tokens.reshape(-1)  # [n]
    check_tokens(tokens, config.vocab_size)
    return cut_windows(tokens, seqlen, windows)


def read_text(
    config: ModelConfig,
    tokenizer: Any,
    calib: Any,
    held_out: Any,
    *,
    seqlen: int,
    windows: int,
    val_ratio: float,
) -> Text:
    """Turns the texts of a run into its windows."""
    if calib is None:
        raise InputError("compress: no calibration text; give calib= a path or token ids")
    _check_seqlen(config, seqlen)
    notes: list[str] = []
    tokens = _tokens(calib, tokenizer, seqlen, windows * seqlen, notes)
    train, val = split_windows(make_windows(config, tokens, seqlen, windows), val_ratio)
    if held_out is None:
        return Text(train, val, val[:0], "calib-val", tuple(notes))
    tokens = _tokens(held_out, tokenizer, seqlen, None, notes)
    scored, protocol = make_windows(config, tokens, seqlen), name_protocol(held_out, "documents")
    return Text(train, val, scored, protocol, tuple(notes))


def name_protocol(text: Any, protocol: str) -> str:
    """Names what turned a text into tokens; ids that come as they are followed none."""
    is_text = isinstance(text, str | Path) and Path(text).suffix != ".npy"
    return protocol if is_text else "tokens"


def _tokens(
    text: Any, tokenizer: Any, seqlen: int, limit: int | None, notes: list[str]
) -> np.ndarray:
    if isinstance(text, str | Path):
        options = {"seqlen": seqlen, "limit": limit, "note": notes.append}
        return load_tokens(text, tokenizer, "documents", **options)
    return np.asarray(text)


def _check_seqlen(config: ModelConfig, seqlen: Any) -> None:
    whole = isinstance(seqlen, int) and not isinstance(seqlen, bool)
    if not whole or not 2 <= seqlen <= config.max_length:
        raise InputError(
            f"seqlen={seqlen!r}; an integer from 2 to {config.max_length} was wanted, the model's "
            "longest context"
        )
