"""Reads a Hugging Face folder lazily: headers first, then one tensor at a time, into our trees.

Opening checks config.json, the headers and the index, and reads no weight; a tensor is then read
from its own byte range, so host memory holds what was asked for and nothing else. Kernels change
orientation here and nowhere deeper: a checkpoint keeps them [d_out, d_in], we keep [d_in, d_out].
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lqec_jax.core.sites import kernel_path
from lqec_jax.errors import InputError, MissingExtra
from lqec_jax.io.files import read_json
from lqec_jax.io.sources.index import INERT, count, few, read_index, say_unread
from lqec_jax.io.sources.scan import (
    WEIGHT_DTYPES,
    check_finite,
    count_non_finite,
    scan_checkpoint,
)
from lqec_jax.io.tensor_file import (
    INDEX,
    SINGLE,
    TensorEntry,
    read_entry,
    read_header,
    read_part,
    same_bytes,
)
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.families import Cut, Family, StoredTensor
from lqec_jax.models.parameters import with_constants

EMBEDDED = Path(__file__).parents[2] / "demo" / "model"  # by the name `demo`, see lqec_jax.demo
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder of weights, opened but not read; holds no open file and no array.

    Example:
      >>> checkpoint = Checkpoint.open("models/babyllama")
      >>> checkpoint.read("model.norm.weight").shape
      (128,)
    """

    folder: Path
    config: dict = dataclasses.field(repr=False)
    entries: dict[str, TensorEntry] = dataclasses.field(repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Checks config.json, every header and the index; reads no tensor but one that lies twice.

        What is there and is not read, as a `consolidated.safetensors` beside shards, is logged.
        Args:
          folder: a local folder, or a hub id `org/name`, which is fetched when the [hf] extra is
            installed (with HF_HUB_OFFLINE=1 only from the local cache).
        Raises:
          InputError: no such folder; config.json, a shard or the index is missing or damaged (with
            the byte sizes where a file is cut short); the index and the shards disagree about
            what there is; only pickled weights.
        """
        folder = find_folder(folder)
        config = read_json(folder / "config.json")
        single, index = (folder / SINGLE).exists(), (folder / INDEX).exists()
        if single and index:
            raise InputError(
                f"{folder} holds both {SINGLE} and {INDEX}, two versions of the weights; "
                "move the stale one away"
            )
        if not single and not index:
            raise InputError(_no_weights(folder))
        path = folder / INDEX
        entries = read_index(path, read_json(path)) if index else read_header(folder / SINGLE)
        say_unread(folder, entries)
        return cls(folder, config, entries)

    def names(self) -> list[str]:
        """Returns the names of the tensors, sorted."""
        return sorted(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape as stored, from the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Returns a tensor's dtype as stored, from the header."""
        return self._entry(name).dtype

    def read(self, name: str, cut: Cut | None = None) -> np.ndarray:
        """Reads one tensor, or a cut of it, as stored: shape, dtype and orientation of the file.

        Raises:
          InputError: no such tensor; the file became shorter since it was opened.
        """
        entry = self._entry(name)
        return read_entry(entry) if cut is None else read_part(entry, *cut)

    def fingerprint(self) -> str:
        """Hashes what the model is: sha256 of config.json and the weight files in name order, hex.

        Weights that are not finite are refused in the same pass, see `scan.scan_checkpoint`.

        Cost: reads every byte once, 8 MiB at a time.
        """
        return scan_checkpoint(self.folder / "config.json", self.entries)

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise InputError(f"{self.folder} has no tensor {name!r}; it has {few(self.names())}")
        return self.entries[name]


def check_tensors(checkpoint: Checkpoint, family: Family, config: ModelConfig) -> None:
    """Compares names and shapes with what the family expects, from the headers alone.

    Raises:
      InputError: tensors missing, of another shape, or unknown. A stored rotary table is no weight
        and is let pass; so is the head of a tied model, whose values `read_outer` compares.
    """
    if config.layers > len(checkpoint.entries):  # before as many names are made
        raise InputError(
            f"{checkpoint.folder}: config.json asks for {config.layers} layers, but the files hold "
            f"{len(checkpoint.entries)} tensors; weights are missing, or num_hidden_layers is wrong"
        )
    wanted = _expected_tensors(family, config)
    _check_present(checkpoint, wanted)
    allowed = set(wanted) | {_head_name(family, config)}
    extra = [n for n in checkpoint.names() if n not in allowed and not INERT.fullmatch(n)]
    if extra:
        raise InputError(
            f"{checkpoint.folder}: {count(extra)} that a {config.family} of {config.layers} "
            f"layers does not have: {few(extra)}; dropping weights would change the model, so "
            "check model_type and num_hidden_layers in config.json"
        )
    for name, stored in wanted.items():
        _check_shape(checkpoint, name, stored)


def read_block(
    checkpoint: Checkpoint, family: Family, config: ModelConfig, layer: int, dtype
) -> dict:
    """Reads one decoder block as our nested dict, kernels as [d_in, d_out].

    Args:
      layer: 0 .. config.layers - 1.
      dtype: of every array returned; float32, bfloat16 or float16.
    Raises:
      InputError: a tensor is missing, has another shape, is no floating-point weight, holds NaN or
        Inf, or does not fit float16.
    Cost: host memory of the block plus its largest tensor once more.
    """
    tree = _read_tree(checkpoint, _block_tensors(family, config, layer), dtype)
    return with_constants(config, layer, tree)


def read_outer(checkpoint: Checkpoint, family: Family, config: ModelConfig, dtype) -> dict:
    """Reads what lies outside the blocks (embedding, last norm, head); checks all names first.

    Raises:
      InputError: as `check_tensors` and `read_block`; the file keeps a head of its own although
        config.json ties it to the embedding.
    """
    check_tensors(checkpoint, family, config)
    tensors = family.outer_tensors(config)
    head, embedding = _head_name(family, config), tensors["embed/embedding"].name
    redundant = config.tied_head and head in checkpoint.entries
    if redundant and not same_bytes(*(checkpoint.entries[name] for name in (head, embedding))):
        raise InputError(
            f"{checkpoint.folder}: {head!r} differs from {embedding!r}, but config.json says "
            "tie_word_embeddings: true; set it to false to use this head"
        )
    return _read_tree(checkpoint, tensors, dtype)


def _read_tree(checkpoint: Checkpoint, tensors: dict[str, StoredTensor], dtype) -> dict:
    """Reads `tensors` (our path -> where it is stored) into a nested dict."""
    _check_present(checkpoint, {stored.name: stored for stored in tensors.values()})
    tree: dict = {}
    for path, stored in tensors.items():
        _check_shape(checkpoint, stored.name, stored)
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = _read_weight(checkpoint, stored, np.dtype(dtype))
    return tree


def _read_weight(checkpoint: Checkpoint, stored: StoredTensor, dtype: np.dtype) -> np.ndarray:
    came = checkpoint.read(stored.name, stored.cut)
    where = f"{checkpoint.entries[stored.name].file}: {stored.name!r}"
    if came.dtype.name not in WEIGHT_DTYPES:
        raise InputError(
            f"{where} is {came.dtype.name}, wanted one of {', '.join(sorted(WEIGHT_DTYPES))}; "
            "name the dense original of this checkpoint"
        )
    check_finite(came, checkpoint.entries[stored.name].file, stored.name)
    with np.errstate(over="ignore"):  # counted below, and named
        # The transpose, the copy and the cast are one pass into one new array.
        inner = np.swapaxes(came, -1, -2) if stored.transposed else came
        weight = inner.astype(dtype, order="C", copy=stored.transposed)
    lost = count_non_finite(weight) if dtype == np.float16 else 0
    if lost:
        raise InputError(
            f"{where} has {lost} values beyond the range of float16; choose bfloat16 or float32"
        )
    return weight


def _block_tensors(family: Family, config: ModelConfig, layer: int) -> dict[str, StoredTensor]:
    return {
        path: stored._replace(name=stored.name.format(layer=layer))
        for path, stored in family.block_tensors(config).items()
    }


def _expected_tensors(family: Family, config: ModelConfig) -> dict[str, StoredTensor]:
    """Returns every tensor the model needs, by its stored name."""
    groups = [family.outer_tensors(config)]
    groups += [_block_tensors(family, config, layer) for layer in range(config.layers)]
    return {stored.name: stored for group in groups for stored in group.values()}


def _head_name(family: Family, config: ModelConfig) -> str:
    return family.outer_tensors(dataclasses.replace(config, tied_head=False))[
        kernel_path("head")
    ].name


def _check_present(checkpoint: Checkpoint, wanted: Iterable[str]) -> None:
    missing = [name for name in wanted if name not in checkpoint.entries]
    if missing:
        raise InputError(
            f"{checkpoint.folder}: {count(missing)} missing: {few(missing)}; the files hold "
            f"{len(checkpoint.entries)}; check model_type, num_hidden_layers and "
            "tie_word_embeddings in config.json, or download the rest"
        )


def _check_shape(checkpoint: Checkpoint, name: str, stored: StoredTensor) -> None:
    came = checkpoint.shape(name)
    if came != tuple(stored.shape):
        raise InputError(
            f"{checkpoint.entries[name].file}: {name!r} is {list(came)}, config.json asks for "
            f"{list(stored.shape)}; the config and the weights are of two models"
        )


def find_folder(name: str | Path) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{name} is a file; wanted the folder that holds config.json and {SINGLE}")
    if str(name) == "demo":
        return EMBEDDED
    if _HUB_ID.fullmatch(str(name)):
        return _download(str(name))
    raise InputError(
        f"no folder {name}; wanted a folder with config.json and {SINGLE}, or a hub id"
    )


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        purpose = f"no folder {hub_id!r} here, and fetching it from the hub"
        raise MissingExtra("huggingface_hub", "hf", purpose) from None
    try:
        folder = snapshot_download(
            hub_id,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"],
            # Subfolders and `consolidated` hold the same weights once more under other names.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (OSError, ValueError) as err:
        reason = (str(err).splitlines() or [type(err).__name__])[0].rstrip(".")
        raise InputError(
            f"no folder {hub_id!r} here, and the hub did not give it ({reason}); check the name, "
            "log in with `hf auth login`, or download it where there is a network"
        ) from err
    return Path(folder)


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        return (
            f"{folder} has {few(pickled)} but no {SINGLE}; pickled weights are not read, convert "
            "them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}; download the weights into it"
