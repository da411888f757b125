"""Text to token ids and back, by the tokenizer that lies in a model's folder.

Special tokens are never added on their own: the caller says where a BOS goes, because perplexity
depends on it and tokenizers differ in what they add unasked. A special token spelled out in the
text becomes that token, as everywhere else in this field.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import tokenizers
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lqec_jax.errors import InputError, MissingExtra
from lqec_jax.io.sources.hf import read_json
from lqec_jax.io.sources.sentencepiece import read_normalizer

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt")


class _Backend(NamedTuple):
    """What any tokenizer library gives: text to ids, ids to text, and token -> id."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    vocabulary: dict[str, int]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and what the folder says about its special tokens.

    `bos_id` and `eos_id` are None where the tokenizer has none. `vocab_size` is the number of ids:
    the largest id, added tokens included, plus one; the model's own table may be longer.

    Example:
      >>> tokenizer = Tokenizer.load("models/babyllama")
      >>> tokenizer.decode(tokenizer.encode("Once upon a time", bos=True))
      'Once upon a time'
    """

    folder: Path
    bos_id: int | None
    eos_id: int | None
    vocab_size: int
    special_tokens: dict[str, str] = field(repr=False)  # role, as in bos_token -> its string
    _encode: Callable[[str], list[int]] = field(repr=False)
    _decode: Callable[[list[int]], str] = field(repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, or the older files through transformers ([hf] extra).

        BOS and EOS are what the tokenizer's own files say (a null there means none); config.json is
        asked only where they are silent.
        Raises:
          InputError: no tokenizer files, a damaged file, a special token outside the vocabulary.
          MissingExtra: older files, and transformers is not installed.
        """
        folder = Path(folder)
        backend = _open(folder)
        named = _special_tokens(folder)
        return cls(
            folder=folder,
            bos_id=_special_id(folder, "bos_token", named, backend.vocabulary),
            eos_id=_special_id(folder, "eos_token", named, backend.vocabulary),
            vocab_size=max(backend.vocabulary.values(), default=-1) + 1,
            special_tokens={role: token for role, token in named.items() if token is not None},
            _encode=backend.encode,
            _decode=backend.decode,
        )

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Returns the ids of one text; with `bos`, the BOS id first.

        Raises:
          InputError: `bos` is asked of a tokenizer that has none.
        """
        if bos and self.bos_id is None:
            raise InputError(f"{self.folder}: its tokenizer has no BOS token; encode without bos")
        return [self.bos_id] * bos + self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, special tokens left out."""
        return self._decode([int(i) for i in ids])

    def files(self) -> list[Path]:
        """Returns the tokenizer's files in the folder, the ones an artifact needs a copy of."""
        return [self.folder / name for name in FILES if (self.folder / name).is_file()]

    def chat(self, messages: Sequence[Mapping[str, Any]], *, reply: bool = True) -> str:
        """Renders a conversation by the model's chat template, ready for `encode` without `bos`.

        Args:
          messages: `{"role": ..., "content": ...}` in order.
          reply: ends with the opening of the assistant's next turn.
        Raises:
          InputError: the folder has no template; a message lacks role or content; the template is
            damaged or refuses the conversation.
        """
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise InputError(
                    f"message {number} is {str(message)[:80]!r}; wanted an object with role and "
                    "content"
                )
        template = _chat_template(self.folder)
        values = {"add_generation_prompt": reply, "tools": None, "documents": None}
        try:
            compiled = _chat_environment().from_string(template)
            return compiled.render(messages=list(messages), **values, **self.special_tokens)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as err:
            raise InputError(
                f"{self.folder}: its chat template refused the conversation ({_one_line(err)}); "
                "change the messages or the template"
            ) from err


def has_tokenizer(folder: str | Path) -> bool:
    """Says whether a folder has a tokenizer of any kind."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", *_SLOW_FILES))


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """Opens a folder's tokenizer; None where it has none."""
    return Tokenizer.load(folder) if has_tokenizer(folder) else None


def _one_line(err: Exception) -> str:
    return " ".join(str(err).split())[:200] or type(err).__name__


def _open(folder: Path) -> _Backend:
    if (folder / "tokenizer.json").is_file():
        return _open_fast(folder / "tokenizer.json")
    if any((folder / name).is_file() for name in _SLOW_FILES):
        return _open_slow(folder)
    raise InputError(
        f"{folder} has no tokenizer.json (nor {', '.join(_SLOW_FILES)}); copy the tokenizer's "
        "files beside the weights"
    )


def _open_fast(path: Path) -> _Backend:
    try:
        fast = tokenizers.Tokenizer.from_file(str(path))
    except Exception as err:  # The Rust side raises Exception itself, no subclass.
        read_json(path)  # names the line where the JSON itself is damaged
        raise InputError(f"{path}: not a tokenizer ({_one_line(err)}); restore the file") from err
    # A file may carry the batch settings of whoever saved it; either would change the ids.
    fast.no_truncation()
    fast.no_padding()
    return _Backend(
        encode=_with_normalizer(fast, path.with_name("tokenizer.model")),
        decode=fast.decode,
        vocabulary=fast.get_vocab(),
    )


def _with_normalizer(fast: tokenizers.Tokenizer, model: Path) -> Callable[[str], list[int]]:
    """Returns text -> ids, through the normalizer that a conversion from `model` lost.

    It is applied before the tokenizer: inside, it would move the offsets by which the tokenizer
    decides whether a text begins with a space.
    """

    def encode(text: str) -> list[int]:
        return fast.encode(text, add_special_tokens=False).ids

    if fast.normalizer is not None or not model.is_file():
        return encode
    lost = read_normalizer(model)
    return encode if lost is None else lambda text: encode(lost.normalize_str(text))


def _open_slow(folder: Path) -> _Backend:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        purpose = f"{folder} has no tokenizer.json; reading its older tokenizer files"
        raise MissingExtra("transformers", "hf", purpose) from None
    try:
        slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as err:
        raise InputError(
            f"{folder}: transformers cannot read its tokenizer ({_one_line(err)}); install what it "
            "asks for, or add a tokenizer.json"
        ) from err
    return _Backend(
        encode=lambda text: slow.encode(text, add_special_tokens=False, verbose=False),
        decode=functools.partial(slow.decode, skip_special_tokens=True),
        vocabulary=slow.get_vocab(),
    )


def _special_tokens(folder: Path) -> dict[str, str | None]:
    """Returns role -> token string, None where a file says that there is none."""
    named: dict[str, str | None] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        for role, token in read_json(folder / name).items():
            if not role.endswith("_token"):
                continue
            content = token.get("content") if isinstance(token, dict) else token
            if content is None or isinstance(content, str):
                named[role] = content
    return named


def _special_id(folder: Path, role: str, named: Mapping, vocabulary: Mapping) -> int | None:
    if role in named:
        token = named[role]
        if token is not None and token not in vocabulary:
            raise InputError(
                f"{folder}: {role} {token!r} is not in the tokenizer's vocabulary; correct "
                "tokenizer_config.json"
            )
        return None if token is None else vocabulary[token]
    config = folder / "config.json"
    value = read_json(config).get(f"{role}_id") if config.is_file() else None
    first = value[0] if isinstance(value, list) and value else value
    return first if type(first) is int else None


def _chat_template(folder: Path) -> str:
    """Returns the template text: a file of its own, or a field of tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        raw = read_json(folder / name) if (folder / name).is_file() else {}
        template = raw.get("chat_template")
        if isinstance(template, list):
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
    raise InputError(
        f"{folder} has no chat template (a base model has none); give the prompt as plain text"
    )


class _Generation(Extension):
    """Renders as its body `{% generation %}`, which marks the assistant's words for training."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _dump(value: Any, indent: int | None = None) -> str:
    # jinja's own tojson escapes HTML, which no chat model was trained on.
    return json.dumps(value, indent=indent, ensure_ascii=False)


def _chat_environment() -> ImmutableSandboxedEnvironment:
    """Returns the environment chat templates are written for; sandboxed, they are downloads."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _dump
    environment.globals["raise_exception"] = _refuse
    return environment
