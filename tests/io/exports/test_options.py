"""Options of exports: what a format has, and the one line that refuses the rest."""

import pytest

from lqec_jax.errors import InputError
from lqec_jax.io.exports.options import DTYPES, ExportOptions, read_options


@pytest.mark.parametrize(
    ("format", "options", "why"),
    [
        ("safetensors", {}, "format 'safetensors' is unknown; known: compressed-tensors, flax"),
        ("gptq", {"dtype": "int8"}, "dtype='int8'; one of auto, float32, bfloat16, float16"),
        ("hf", {"base_onyl": True}, "option 'base_onyl' is unknown; did you mean 'base_only'?"),
        ("hf", {"gptq_version": 2}, "gptq_version is for format gptq, not hf"),
        ("gptq", {"base": "x"}, "base is for format peft, not gptq"),
        ("hf", {"dense": True}, "dense is for format flax, not hf"),
        ("peft", {"base_only": True}, "which are all that peft holds"),
    ],
)
def test_an_option_that_a_format_does_not_have_is_refused(format, options, why):
    with pytest.raises(InputError) as said:
        read_options(format, options)
    assert why in str(said.value) and "\n" not in str(said.value)


def test_options_that_say_nothing_are_not_said():
    given = {"base": None, "gptq_version": None, "dense": False, "base_only": False}
    assert read_options("hf", given) == ExportOptions()
    read = read_options(
        "gptq", {**given, "dtype": "bfloat16", "base_only": True, "gptq_version": 2}
    )
    assert read == ExportOptions(DTYPES["bfloat16"], base_only=True, own={"gptq_version": 2})
