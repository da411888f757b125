"""Settings of a compression from a YAML file, `--set` and flags: typed, unknown keys refused."""

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lqec_jax.errors import InputError, did_you_mean

_KINDS = {int: "an integer", float: "a number", str: "a string"}


@dataclass(frozen=True)
class MeshConfig:
    """Over how many devices windows (`data`) and weights (`model`) are split."""

    data: int = 1
    model: int = 1

    def __post_init__(self) -> None:
        if min(self.data, self.model) < 1:
            raise InputError(f"mesh: data={self.data}, model={self.model}; at least 1 was wanted")


@dataclass(frozen=True)
class Claim:
    """What a config must reach, for people and for the tests; it changes nothing of a run.

    Attributes:
      source: where the recipe comes from, paper and table.
      model, text: what it is run on, and what it is then scored on.
      expected: what the source reports there.
      ours: what this library measured there, or 'not run'.
      hardware: what that took.
      command: the whole command.
    """

    source: str = ""
    model: str = ""
    text: str = ""
    expected: str = ""
    ours: str = ""
    hardware: str = ""
    command: str = ""


@dataclass(frozen=True)
class CompressConfig:
    """Everything that decides a compression but the model; see `api.compress`."""

    recipe: str | None = None
    calib: str | None = None
    seqlen: int = 512
    windows: int = 320
    val_ratio: float = 0.2
    seed: int = 0
    dtype: str = "auto"
    mesh: MeshConfig | None = None
    eval: str | None = None
    claim: Claim | None = None


def resolve(
    flags: Mapping[str, Any], file: str | Path | None = None, settings: Sequence[str] = ()
) -> CompressConfig:
    """Puts the sources together: defaults, then the file, then flags, then `a.b=c` settings.

    Args:
      flags: by field; None is a flag that was not given.
    Raises:
      InputError: an unknown key (with the nearest known one), a value of another type, a file that
        is missing or no YAML.
    Example:
      >>> resolve({"seed": 3}, settings=["mesh.data=2"]).mesh
      MeshConfig(data=2, model=1)
    """
    values = {} if file is None else read_yaml(file)
    config = _build(CompressConfig, values, "" if file is None else f"{file}: ")
    given = {name: value for name, value in flags.items() if value is not None}
    config = _replace(config, given, "--")
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting!r}; name=value was wanted")
        config = _set(config, name.strip().split("."), text.strip(), f"--set {setting}: ")
    return config


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping.

    Raises:
      InputError: no such file; not YAML (line named); not a mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"{path}{where}: not YAML ({problem}); correct the file") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}; name: value lines were wanted")
    return values


def dump(config: CompressConfig) -> str:
    """Writes a configuration as YAML, which `resolve` reads back to an equal one."""
    import yaml

    values = {name: v for name, v in dataclasses.asdict(config).items() if v is not None}
    return yaml.safe_dump(values, sort_keys=False, width=4096)


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    return _replace(cls(), values, where)


def _replace(config: Any, values: Mapping[str, Any], where: str) -> Any:
    converted = {name: _convert(type(config), name, v, where) for name, v in values.items()}
    return dataclasses.replace(config, **converted)


def _set(config: Any, names: Sequence[str], text: str, where: str) -> Any:
    """Changes one field, or a field of a field, given as text."""
    kind, _ = _kind(type(config), names[0], where)
    if len(names) == 1:
        return _replace(config, {names[0]: _read_text(text, kind)}, where)
    if not dataclasses.is_dataclass(kind):
        raise InputError(f"{where}{names[0]} has no parts; write {names[0]}=value")
    inner = getattr(config, names[0]) or kind()
    return dataclasses.replace(config, **{names[0]: _set(inner, names[1:], text, where)})


def _read_text(text: str, kind: type) -> Any:
    """Reads a number where one is wanted; what is none stays text, and is refused by its type."""
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def _convert(cls: type, name: Any, value: Any, where: str) -> Any:
    kind, optional = _kind(cls, name, where)
    if value is None and optional:
        return None
    if kind is MeshConfig:
        return _read_mesh(value, f"{where}{name}")
    if kind is Claim:
        return _read_claim(value, f"{where}{name}")
    accepted = int | float if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise InputError(f"{where}{name} is {reprlib.repr(value)}; {_KINDS[kind]} was wanted")
    return kind(value)


def _read_mesh(value: Any, where: str) -> MeshConfig:
    """Reads a mesh from {'data': 2, 'model': 4} or 'data=2,model=4'."""
    if isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",")]
        value = {name.strip(): _read_text(size.strip(), int) for name, _, size in pairs}
    if not isinstance(value, dict):
        raise InputError(f"{where} is {reprlib.repr(value)}; data=2,model=4 was wanted")
    return _build(MeshConfig, value, f"{where}: ")


def _read_claim(value: Any, where: str) -> Claim:
    if not isinstance(value, dict):
        raise InputError(f"{where} is {reprlib.repr(value)}; source:, expected: ... were wanted")
    return _build(Claim, value, f"{where}: ")


def _kind(cls: type, name: Any, where: str) -> tuple[type, bool]:
    """Returns a field's type and whether it may be None."""
    hints = get_type_hints(cls)
    if name not in hints:
        raise InputError(f"{where}unknown key {reprlib.repr(name)}{did_you_mean(str(name), hints)}")
    kinds = get_args(hints[name]) or (hints[name],)
    return next(kind for kind in kinds if kind is not type(None)), type(None) in kinds
