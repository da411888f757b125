"""Text to token ids and back, by the tokenizer that lies in a model's folder.

Special tokens are never added on their own: the caller says where a BOS goes, because perplexity
depends on it and tokenizers differ in what they add unasked. A special token spelled out in the
text becomes that token, as everywhere else in this field.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import dropwhile
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from lqec_jax.errors import InputError, MissingExtra
from lqec_jax.io.files import read_json
from lqec_jax.io.sources.chat import read_template, render_chat
from lqec_jax.io.sources.sentencepiece import read_normalizer
from lqec_jax.models.raw_config import Section

GENERATION = "generation_config.json"
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
    GENERATION,
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

    `bos_id` and `eos_id` are None where the tokenizer has none. `end_ids` are all that the folder
    names as ending a text: the tokenizer's, config.json's and generation_config.json's.
    `vocab_size` is the number of ids: the largest id, added tokens included, plus one; the model's
    own table may be longer.

    Example:
      >>> tokenizer = Tokenizer.load("models/babyllama")
      >>> tokenizer.decode(tokenizer.encode("Once upon a time", bos=True))
      'Once upon a time'
    """

    folder: Path
    bos_id: int | None
    eos_id: int | None
    end_ids: frozenset[int]
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
        eos_id = _special_id(folder, "eos_token", named, backend.vocabulary)
        return cls(
            folder=folder,
            bos_id=_special_id(folder, "bos_token", named, backend.vocabulary),
            eos_id=eos_id,
            end_ids=_end_ids(folder) | ({eos_id} - {None}),
            vocab_size=max(backend.vocabulary.values(), default=-1) + 1,
            special_tokens={role: token for role, token in named.items() if token is not None},
            _encode=backend.encode,
            _decode=backend.decode,
        )

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Returns the ids of one text; with `bos`, the BOS id first, once, the text's own or not.

        Raises:
          InputError: `bos` is asked of a tokenizer that has none; the text is no Unicode.
        """
        if bos and self.bos_id is None:
            raise InputError(f"{self.folder}: its tokenizer has no BOS token; encode without bos")
        try:
            text.encode()
        except UnicodeEncodeError as err:  # of a terminal, of a template; no tokenizer takes it
            raise InputError(
                f"the text holds half a surrogate pair at character {err.start}; give UTF-8"
            ) from err
        ids = self._encode(text)
        return [self.bos_id, *dropwhile(self.bos_id.__eq__, ids)] if bos else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, special tokens left out."""
        return self._decode([int(i) for i in ids])

    def files(self) -> list[Path]:
        """Returns what is beside the weights in the folder, the files an artifact has a copy of."""
        return [self.folder / name for name in FILES if (self.folder / name).is_file()]

    def chat(self, messages: Sequence[Mapping[str, Any]], *, reply: bool = True) -> str:
        """Renders a conversation by the model's chat template, ready for `encode` without `bos`.

        Args:
          messages: `{"role": ..., "content": ...}` in order.
          reply: ends with the opening of the assistant's next turn.
        Raises:
          InputError: the folder has no template; a message lacks role or content; whatever
            `chat.render_chat` refuses.
        """
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise InputError(
                    f"message {number} is {str(message)[:80]!r}; wanted an object with role and "
                    "content"
                )
        values = {"add_generation_prompt": reply, "tools": None, "documents": None}
        values |= {"messages": list(messages)} | self.special_tokens
        return render_chat(_chat_template(self.folder), values, self.folder)


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
    value = _read_section(folder / "config.json").values.get(f"{role}_id")
    first = value[0] if isinstance(value, list) and value else value
    return first if type(first) is int and 0 <= first < 2**31 else None


def _end_ids(folder: Path) -> frozenset[int]:
    names = ("config.json", GENERATION)
    return frozenset().union(*(_read_section(folder / name).ids("eos_token_id") for name in names))


def _read_section(path: Path) -> Section:
    return Section(read_json(path) if path.is_file() else {}, file=str(path))


def _chat_template(folder: Path) -> str:
    """Returns the template text: a file of its own, or a field of tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return read_template(folder / "chat_template.jinja")
    for name in ("chat_template.json", "tokenizer_config.json"):
        raw = read_json(folder / name) if (folder / name).is_file() else {}
        template = raw.get("chat_template")
        if isinstance(template, list):
            named = (t for t in template if isinstance(t, dict) and t.get("name") == "default")
            template = next(named, {}).get("template")
        if isinstance(template, str):
            return template
    raise InputError(
        f"{folder} has no chat template (a base model has none); give the prompt as plain text"
    )
