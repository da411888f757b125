"""Reads a checkpoint's config.json strictly: typed values, refusal by name, both rope spellings.

A key this package does not model may change the logits, and a wrong logit is never announced. So a
family names the keys it models and the keys it knows to be inert; everything else is refused.
"""

import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lqec_jax.errors import InputError, did_you_mean
from lqec_jax.models.config import Rope

REQUIRED = object()

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Section:
    """One JSON object of a config; its typed readers raise `InputError` with the key's full name.

    A key that is absent takes `default`; without a default it is required. `null` is accepted only
    where the default is None, because elsewhere it says that the file is damaged.
    """

    values: Mapping[str, Any]
    prefix: str = ""
    file: str = "config.json"

    def count(self, key: str, default: Any = REQUIRED, at_least: int = 1) -> Any:
        """Returns an int >= `at_least`."""
        wanted = "a positive integer" if at_least == 1 else f"an integer of at least {at_least}"
        return self._read(
            key, default, wanted, lambda v: type(v) is int and v >= at_least, lambda v: v
        )

    def number(self, key: str, default: Any = REQUIRED, at_least: float | None = None) -> Any:
        """Returns a finite float, > 0 or >= `at_least`."""
        if at_least is None:
            return self._read(
                key, default, "a positive number", lambda v: _is_number(v) and v > 0, float
            )
        wanted = f"a number of at least {at_least:g}"
        return self._read(key, default, wanted, lambda v: _is_number(v) and v >= at_least, float)

    def flag(self, key: str, default: Any = REQUIRED) -> Any:
        """Returns a bool."""
        return self._read(key, default, "true or false", lambda v: isinstance(v, bool), bool)

    def choice(self, key: str, names: Mapping[str, str], default: Any = REQUIRED) -> str:
        """Returns our name for the word that the file gives."""
        word = self._read(key, default, "a string", lambda v: isinstance(v, str), str)
        if word not in names:
            raise self.error(key, f"is {word!r}, which is not supported{did_you_mean(word, names)}")
        return names[word]

    def ids(self, key: str) -> frozenset[int]:
        """Returns the token ids under `key`: one, a list of them, or none; below 0 is none."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and i < 2**31 for i in ids):
            came = reprlib.repr(value)
            raise self.error(key, f"is {came}; wanted an id, a list of ids or null; correct it")
        return frozenset(i for i in ids if i >= 0)

    def section(self, key: str) -> "Section":
        """Returns the JSON object under `key`; absent and null are empty."""
        values = self.values.get(key)
        if values is not None and not isinstance(values, Mapping):
            raise self.error(key, f"is {values!r}; wanted an object or null; correct the file")
        return Section(values or {}, f"{self.prefix}{key}.", self.file)

    def refuse_unknown(
        self, modelled: Collection[str], inert: Collection[str], neutral: Mapping[str, Any]
    ) -> None:
        """Refuses by name each key that may change the logits.

        Args:
            modelled: keys that the caller reads.
            inert: keys whose value cannot change the logits.
            neutral: keys that leave the logits alone at one value, which is given.
        Null and empty values are accepted for any key: they ask for nothing.
        """
        for key, value in self.values.items():
            if key in modelled or key in inert or value is None or value in ({}, []):
                continue
            if key not in neutral:
                near = did_you_mean(key, modelled)
                raise self.error(
                    key,
                    f"= {reprlib.repr(value)} is not modelled and may change the logits; "
                    f"remove it if it cannot{near}",
                )
            if value != neutral[key]:
                raise self.error(
                    key, f"is {value!r}; only {neutral[key]!r} is modelled; use another checkpoint"
                )

    def error(self, key: str, problem: str) -> InputError:
        """Returns the one-line error about `key`."""
        return InputError(f"{self.file}: {self.prefix}{key} {problem}")

    def _read(
        self,
        key: str,
        default: Any,
        wanted: str,
        fits: Callable[[Any], bool],
        cast: Callable[[Any], Any],
    ) -> Any:
        value = self.values.get(key, default)
        if value is REQUIRED:
            raise self.error(key, f"is missing; wanted {wanted}; add it")
        if value is None and default is None:
            return None
        if not fits(value):
            raise self.error(key, f"is {value!r}; wanted {wanted}; correct the file")
        return cast(value)


def read_rope(config: Section, max_length: int) -> Rope:
    """Reads the rotary embedding from either spelling of config.json.

    Older files have `rope_theta` beside `rope_scaling: {"type" or "rope_type": ...}`; newer ones
    have `rope_parameters: {"rope_type", "rope_theta", ...}`. `max_length` is
    `max_position_embeddings`: it stands in for the original context where the file gives none, and
    dynamic scaling has no other.
    Raises: InputError: a kind, key or value that is not modelled, or two spellings that disagree.
    """
    spelled = [config.section(key) for key in ("rope_scaling", "rope_parameters")]
    ropes = [_read_rope_section(part, config, max_length) for part in spelled if part.values]
    if not ropes:
        return Rope(theta=_theta(config, 10000.0))
    if ropes[0] != ropes[-1]:
        raise config.error(
            "rope_scaling", "and rope_parameters disagree; wanted one of them; remove the other"
        )
    return ropes[0]


def _theta(section: Section, default: float) -> float:
    theta = section.number("rope_theta", default)
    if theta <= 1:
        raise section.error("rope_theta", f"is {theta!r}; wanted more than 1; correct the file")
    return theta


def _read_rope_section(part: Section, config: Section, max_length: int) -> Rope:
    kind = _rope_kind(part)
    known = ("type", "rope_type", "rope_theta", *_ROPE_KEYS[kind])
    part.refuse_unknown(known, inert=(), neutral={"partial_rotary_factor": 1.0})
    theta = _theta(part, _theta(config, 10000.0))
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope("linear", theta, part.number("factor", at_least=1))
    if kind == "dynamic":
        return Rope("dynamic", theta, part.number("factor", at_least=1), max_length)
    if kind == "llama3":
        return _read_llama3(part, theta, max_length)
    return _read_yarn(part, theta, max_length)


def _rope_kind(part: Section) -> str:
    kinds = {kind: kind for kind in _ROPE_KEYS}
    named = {part.choice(key, kinds) for key in ("type", "rope_type") if key in part.values}
    if len(named) > 1:
        raise part.error("type", f"and rope_type disagree ({sorted(named)}); remove one of them")
    return named.pop() if named else "default"


def _read_llama3(part: Section, theta: float, max_length: int) -> Rope:
    low, high = part.number("low_freq_factor"), part.number("high_freq_factor")
    if low >= high:
        raise part.error(
            "low_freq_factor", f"is {low!r}; wanted less than high_freq_factor {high!r}"
        )
    return Rope(
        "llama3",
        theta,
        part.number("factor", at_least=1),
        part.count("original_max_position_embeddings", max_length),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _read_yarn(part: Section, theta: float, max_length: int) -> Rope:
    original = part.count("original_max_position_embeddings", max_length)
    # A null factor asks for the ratio of the two lengths; an absent one is a damaged file.
    if "factor" in part.values and part.values["factor"] is None:
        part = Section({**part.values, "factor": max_length / original}, part.prefix)
    fast = part.number("beta_fast", None) or 32.0
    slow = part.number("beta_slow", None) or 1.0
    if fast < slow:
        raise part.error("beta_fast", f"is {fast!r}; wanted at least beta_slow {slow!r}")
    return Rope(
        "yarn",
        theta,
        part.number("factor", at_least=1),
        original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=part.number("attention_factor", None),
        mscale=part.number("mscale", None),
        mscale_all_dim=part.number("mscale_all_dim", None),
        truncate=part.flag("truncate", True),
    )
