"""THE TABLE: every method, one line each. Adding a method is one file and one line here."""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from lqec_jax.errors import InputError, did_you_mean


class Method(NamedTuple):
    """A row: where the factory lives, what it sees, and what `lqec methods` prints of it."""

    factory: str
    scope: str
    bits: str
    statistics: str
    paper: str
    idea: str


# fmt: off
METHODS = {
    "rtn": Method("lqec_jax.quantizers.rtn:rtn", "linear", "1-8", "none, or rms", "2210.17323", "round each weight to its group's uniform grid"),
    "hqq": Method("lqec_jax.quantizers.hqq:hqq", "linear", "1-8", "none", "Badri & Shaji 2023", "real zeros fitted under a heavy-tailed error"),
    "gptq": Method("lqec_jax.quantizers.gptq:gptq", "linear", "1-8", "gram", "2210.17323", "round inputs in turn, let the later ones make up for the error"),
    "omniquant": Method("lqec_jax.trainings.omniquant:omniquant", "block", "1-8", "both streams", "2308.13137", "train where each group's range is clipped, block by block"),
    "block_ap": Method("lqec_jax.trainings.block_ap:block_ap", "block", "1-8", "both streams", "2407.11062", "train weights, scales and zeros of a block together, then round"),
    "slim_quant": Method("lqec_jax.quantizers.slim_quant:slim_quant", "linear", "2-8", "none, or rms", "2410.09615", "one scale a matrix, clipped where its error is least"),
    "quantize_input": Method("lqec_jax.transforms.quantize_input:quantize_input", "linear", "8-8, or 2-8 as int", "none", "2410.09615", "round what a linear reads, to 8-bit floats or integers"),
    "hadamard": Method("lqec_jax.transforms.hadamard:hadamard", "linear", "-", "none", "2402.04396", "rotate inputs or outputs, so that no weight stands out"),
    "nf": Method("lqec_jax.quantizers.nf:nf", "linear", "2-4", "none", "2305.14314", "levels at the quantiles of a normal, scales quantized again by option"),
    "higgs": Method("lqec_jax.quantizers.higgs:higgs", "linear", "2-4", "none", "2411.17525", "rotate, then the best grid for pairs of normal numbers"),
    "e8p": Method("lqec_jax.quantizers.e8p:e8p", "linear", "2-4", "gram", "2402.04396", "rotate both sides, then a lattice of eights with error feedback"),
    "squeezellm": Method("lqec_jax.quantizers.squeezellm:squeezellm", "linear", "1-4", "fisher, rms or none", "2306.07629", "each column's best levels under the loss's weights, outliers apart"),
    "bcq": Method("lqec_jax.quantizers.bcq:bcq", "linear", "1-4", "none", "2206.09557", "a sum of scaled signs, fitted or taken from a uniform grid"),
    "ternary": Method("lqec_jax.quantizers.ternary:ternary", "linear", "2", "none", "2406.07177", "three levels a group by threshold and least squares"),
    "onebit": Method("lqec_jax.quantizers.onebit:onebit", "linear", "1", "none", "2402.11295", "a sign each, magnitudes of rank one"),
    "awq": Method("lqec_jax.quantizers.awq:awq", "linear", "2-8", "gram", "2306.00978", "enlarge the channels that see large inputs, clip, and round"),
    "magnitude": Method("lqec_jax.sparsifiers.magnitude:magnitude", "linear", "-", "none", "1506.02626", "set the smallest weights to zero"),
    "wanda": Method("lqec_jax.sparsifiers.wanda:wanda", "linear", "-", "rms", "2306.11695", "set to zero what is smallest beside its input"),
    "sparsegpt": Method("lqec_jax.sparsifiers.sparsegpt:sparsegpt", "linear", "1-8, or none", "gram", "2301.00774", "prune inputs in turn, let the later ones make up for the error"),
    "e2e_qp": Method("lqec_jax.trainings.e2e_qp:e2e_qp", "model", "-", "text", "2407.11062", "train all scales of a rounded model on the next token"),
    "peqa": Method("lqec_jax.trainings.peqa:peqa", "model", "-", "text", "2305.14152", "train scales alone on a task, so that one set of codes serves many"),
    "svd": Method("lqec_jax.compensation.svd:svd", "linear", "-", "none", "Eckart-Young 1936", "the best rank-r correction of the weight error"),
    "lqer": Method("lqec_jax.compensation.svd:lqer", "linear", "-", "none", "2402.02446", "the same under LQER's name, before it weighs inputs"),
    "naive_lora": Method("lqec_jax.compensation.svd:naive_lora", "linear", "-", "none", "2410.09615", "the same with the rank that SLiM compares itself at"),
    "loftq": Method("lqec_jax.compensation.loftq:loftq", "linear", "-", "the quantizer's", "2310.08659", "round what the factors leave, factor what the rounding leaves, and again"),
    "l2qer": Method("lqec_jax.compensation.whitened:l2qer", "linear", "-", "absmean", "2402.02446", "the best correction with inputs weighed by their mean size"),
    "slim_lora": Method("lqec_jax.compensation.whitened:slim_lora", "linear", "-", "rms, or absmean", "2410.09615", "the best correction with inputs weighed by a saliency that is never zero"),
    "qera_approx": Method("lqec_jax.compensation.whitened:qera_approx", "linear", "-", "rms", "2410.06040", "the best correction for inputs without correlations"),
    "qera": Method("lqec_jax.compensation.whitened:qera", "linear", "-", "gram", "2410.06040", "the correction of its rank that leaves the least output error"),
    "eora": Method("lqec_jax.compensation.whitened:eora", "linear", "-", "gram", "2410.21271", "the same by the eigenspace of the inputs' gram"),
    "caldera": Method("lqec_jax.compensation.caldera:caldera", "linear", "-", "gram", "2405.18886", "a base and factors in few bits in turns, by what the inputs see"),
    "aser": Method("lqec_jax.compensation.aser:aser", "linear", "-", "gram, absmean", "2411.07762", "as qera of the rank it takes, outliers kept out of the base"),
    "lq_lora": Method("lqec_jax.compensation.lq_lora:lq_lora", "linear", "-", "fisher", "2311.12023", "the best correction by the loss's curvature on both sides"),
    "quantize_adapter": Method("lqec_jax.compensation.quantize_adapter:quantize_adapter", "linear", "2-8", "none", "2410.09615", "store the factors of adapters in a few bits, a scale a group"),
    "lrec": Method("lqec_jax.trainings.lrec:lrec", "model", "-", "hidden states", "2306.08162", "train all adapters on the teacher's predictions + next token"),
    "apiq": Method("lqec_jax.trainings.apiq:apiq", "block", "1-8", "both streams", "2402.05147", "train clipped grids and adapters together, by blocks or by weights"),
    "finetune": Method("lqec_jax.trainings.finetune:finetune", "model", "-", "text", "2410.09615", "train adapters, quantized ones too, on the next token of the text"),
    "rilq": Method("lqec_jax.trainings.rilq:rilq", "model", "-", "hidden states", "2412.01129", "train all adapters on one model-wise loss + next token"),
    "merge": Method("lqec_jax.compensation.merge:merge", "linear", "-", "none", "2309.14717", "fold pooled adapters into the base's zero points, exactly"),
}
# fmt: on


def find_factory(name: str) -> Callable:
    """Imports a method's factory.

    Raises:
      InputError: no such method; names the nearest one.
    """
    if name not in METHODS:
        raise InputError(f"recipe: unknown method {name!r}{did_you_mean(name, METHODS)}")
    module, _, factory = METHODS[name].factory.partition(":")
    return getattr(import_module(module), factory)
