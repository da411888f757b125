"""Large language models at 2-4 bits that still work, in JAX.

Names are loaded when they are first used: `import lqec_jax` itself imports no jax.
"""

from importlib import import_module, metadata
from typing import Any

_NAMES = {
    "combine": "lqec_jax.core.tree:combine",
    "compare": "lqec_jax.analysis.comparison:compare",
    "compress": "lqec_jax.api:compress",
    "divergence": "lqec_jax.api:divergence",
    "export": "lqec_jax.api:export",
    "finetune": "lqec_jax.api:finetune",
    "from_flax": "lqec_jax.io.sources.flax:from_flax",
    "generate": "lqec_jax.evaluate.generate:generate",
    "InputError": "lqec_jax.errors:InputError",
    "linear": "lqec_jax.core.linear:linear",
    "load": "lqec_jax.api:load",
    "load_flax": "lqec_jax.io.exports.flax:load",
    "logits": "lqec_jax.api:logits",
    "losses": "lqec_jax.train.losses",
    "Model": "lqec_jax.models.model:Model",
    "model_fns": "lqec_jax.models.decoder:model_fns",
    "ModelFns": "lqec_jax.core.types:ModelFns",
    "packed": "lqec_jax.foreign.linen:packed",
    "partition": "lqec_jax.core.tree:partition",
    "perplexity": "lqec_jax.api:perplexity",
    "plan": "lqec_jax.planning.plan:plan",
    "quantize": "lqec_jax.api:quantize",
    "quantize_tree": "lqec_jax.foreign.quantize:quantize_tree",
    "repack": "lqec_jax.api:repack",
    "reproduce": "lqec_jax.analysis.reproduction:reproduce",
    "save": "lqec_jax.api:save",
    "train": "lqec_jax.train",
    "verify": "lqec_jax.api:verify",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("lqec-jax")
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
