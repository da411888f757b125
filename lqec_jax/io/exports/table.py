"""The formats that a model is exported in, one line each.

A format is one module, `io.exports.NAME` with `write(model, folder, dtype, **own) -> notes`, and
its counterpart, `io.verify.NAME` with `read(folder, record) -> {name: thunk}`, which shares nothing
with it. `export` gives the writer an empty folder, `verify` compares what the reader finds.
"""

from typing import NamedTuple


class Format(NamedTuple):
    """One line of the table.

    Attributes:
      module: the name of the writer in `io.exports`, and of the reader in `io.verify`.
      holds: what of a model it can say: 'base'; 'adapters', apart from the base; 'inputs', how
        packed weights round what they read.
      own: options of its writer that not every format has; None and False are not said.
      unpacks: its writer makes every packed weight one dense array, which is rounded whole.
      names: whose names the reader gives: 'checkpoint', with kernels [d_out, d_in], or 'ours'.
    """

    module: str
    holds: frozenset[str] = frozenset({"base"})
    own: tuple[str, ...] = ()
    unpacks: bool = False
    names: str = "checkpoint"

    @property
    def writer(self) -> str:
        return f"lqec_jax.io.exports.{self.module}"

    @property
    def reader(self) -> str:
        return f"lqec_jax.io.verify.{self.module}"


ALL = frozenset({"base", "adapters", "inputs"})
FORMATS = {
    "hf": Format("dense", unpacks=True),
    "peft": Format("peft", frozenset({"adapters"}), own=("base",)),
    "gptq": Format("gptq", own=("gptq_version",)),
    "compressed-tensors": Format("compressed_tensors"),
    "flax": Format("flax", ALL, own=("dense",), names="ours"),
}
