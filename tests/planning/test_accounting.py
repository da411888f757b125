"""INT2.1's sizes of a 7B model and what its training holds, worked out by hand."""

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
    assert facts["paper"] == {"overhead": 1.05, "saving": 5.6, "packed_bytes": 4_930_000_000}


def test_fine_tuning_beside_packed_weights_takes_a_fifth_of_that_beside_dense_ones():
    facts = account(families.read_config(LLAMA_7B))
    training = facts["training"]
    numbers = LAYERS * (4 * D * D + 3 * D * FF + 2 * D) + 2 * VOCAB * D + D
    adapters = 4 * LAYERS * 2 * 8 * 2 * D  # float32, rank 8 on q and v
    token = 2 * (LAYERS * D + 12 * D + 4 * FF)  # every block's input, and one block's inside
    assert training["parts"] == {
        "adapters, their moments, the best": 4 * adapters,
        "gradients": 2 * adapters,
        "activations": 512 * token,
        "logits": 512 * 2 * 4 * 8192 + 4 * 8192 * D,
    }
    beside = sum(training["parts"].values())
    assert training["dense16_bytes"] == 2 * numbers + beside
    assert training["dense32_bytes"] == 4 * numbers + beside
    tiles = training["packed_bytes"] - facts["base_bytes"] - beside
    assert 0 < tiles < 0.03 * training["packed_bytes"]
    assert round(training["packed_bytes"] / 1e9, 2) == 2.81
    assert round(training["dense16_bytes"] / 1e9, 2) == 13.97
    assert (round(training["saving"], 2), round(training["saving_from_32"], 2)) == (4.98, 9.78)
    # What the paper's two figures say was held before is what weights of 32 bits hold.
    before = facts["paper"]["saving"] * facts["paper"]["packed_bytes"]
    assert abs(before / training["dense32_bytes"] - 1) < 0.01
