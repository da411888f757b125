"""INT2.1's sizes of a 7B model, worked out by hand from its layout."""

from lqec_jax.models import families
from lqec_jax.planning.accounting import account
from tests.planning.shapes import LLAMA_7B

D, FF, LAYERS, VOCAB = 4096, 11008, 32, 32000


def test_the_overhead_of_seven_billion_parameters_is_the_paper_s_five_to_seven_percent():
    facts = account(families.read_config(LLAMA_7B))
    weights = LAYERS * (4 * D * D + 3 * D * FF)
    groups = weights // 128
    outer = 2 * VOCAB * D + (2 * LAYERS + 1) * D
    assert facts["base_bytes"] == weights // 4 + groups * 2 + groups // 4 + 2 * outer
    assert facts["adapter_bytes"] == LAYERS * 2 * 32 * (4 * 2 * D + 3 * (D + FF))
    assert round(facts["base_bytes"] / 1e9, 2) == 2.26
    assert round(facts["overhead"], 3) == 1.071
    assert round(facts["overhead_without_down"], 3) == 1.057
