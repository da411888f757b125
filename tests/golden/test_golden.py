"""THE TABLE of what says that a method's numbers are right: every method has a row.

A row names a test, as `file::function`, and what it compares with: numbers of the authors' code, a
closed form, or, where neither can be had, what is known instead and why. A new method adds its own.
"""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from lqec_jax.methods import METHODS
from tests.sources import ROOT, parse

TESTS = ROOT / "tests"
AUTHORS = "golden/authors"


class Source(NamedTuple):
    """Where a method's numbers are compared.

    Attributes:
      kind: 'authors' or 'closed form', or 'neither' with a reason.
      test: the end of a test file's path and a function of it.
      reason: why there is no golden number.
    """

    kind: str
    test: str
    reason: str = ""


def authors(test: str) -> Source:
    return Source("authors", f"{AUTHORS}/{test}")


def closed_form(test: str) -> Source:
    return Source("closed form", test)


def neither(reason: str, test: str) -> Source:
    return Source("neither", test, reason)


GOLDEN = {
    "rtn": authors("test_corrections.py::test_rounding_gives_the_base_that_they_were_given"),
    "hqq": authors("test_hqq.py::test_our_rounds_in_their_units_and_order_end_where_theirs_do"),
    "gptq": authors("test_gptq.py::test_codes_are_theirs_where_grids_are_fitted_alike"),
    "omniquant": authors("test_clipping.py::test_codes_and_gradients_are_theirs"),
    "block_ap": authors("test_efficientqat.py::test_codes_and_gradients_are_theirs"),
    "slim_quant": authors("test_slim.py::test_the_clip_of_the_integral_is_in_the_bin_of_theirs"),
    "quantize_input": closed_form(
        "test_inputs.py::test_integers_are_the_nearest_levels_up_to_the_largest"
    ),
    "hadamard": closed_form("test_hadamard.py::test_a_rotation_loses_nothing_and_spreads_outliers"),
    "nf": authors("test_loftq.py::test_base_and_product_are_theirs"),
    "higgs": closed_form("test_higgs.py::test_distortion_of_gaussian_weights"),
    "e8p": authors("test_e8p.py::test_normal_numbers_have_their_error"),
    "squeezellm": closed_form("test_squeezellm.py::test_no_clusters_are_better"),
    "bcq": closed_form("test_bcq.py::test_a_uniform_grid_is_rewritten_exactly"),
    "ternary": closed_form(
        "test_ternary.py::test_levels_are_the_least_squares_of_the_thresholded_signs"
    ),
    "onebit": closed_form("test_onebit.py::test_no_rank_one_magnitudes_are_nearer"),
    "awq": authors("test_awq.py::test_ours_goes_the_same_way_for_down"),
    "magnitude": closed_form("test_magnitude.py::test_of_every_few_inputs_the_largest_stay"),
    "wanda": authors("test_wanda.py::test_masks_are_theirs"),
    "sparsegpt": authors(
        "test_sparsegpt.py::test_a_pattern_keeps_what_theirs_keeps_and_makes_the_same_of_it"
    ),
    "e2e_qp": neither(
        "no numbers of its authors' second phase are at hand; what a scale's gradient is, is "
        "compared for block_ap, and what it lowers is the decoder's next-token loss",
        f"{AUTHORS}/test_tiny_llama.py::test_the_next_token_loss_is_theirs",
    ),
    "peqa": closed_form(
        "test_peqa.py::test_scales_come_to_the_least_squares_of_their_codes_and_not_below"
    ),
    "svd": closed_form("test_svd.py::test_what_is_left_is_the_tail_of_the_error"),
    "lqer": authors("test_corrections.py::test_lqer_is_theirs"),
    "naive_lora": authors("test_slim.py::test_the_naive_adapter_is_theirs"),
    "loftq": authors("test_loftq.py::test_base_and_product_are_theirs"),
    "l2qer": authors("test_corrections.py::test_l2qer_is_theirs_where_it_is_given_their_scale"),
    "slim_lora": authors(
        "test_slim.py::test_the_adapter_is_theirs_where_a_dead_input_counts_as_theirs"
    ),
    "qera_approx": authors("test_corrections.py::test_qera_is_theirs"),
    "qera": authors("test_corrections.py::test_qera_is_theirs"),
    "eora": authors("test_corrections.py::test_eora_is_theirs_on_one_sample"),
    "caldera": authors("test_caldera.py::test_our_factors_of_their_base_are_theirs"),
    "aser": closed_form("test_aser.py::test_aser_is_qera_with_the_rank_of_the_rule"),
    "lq_lora": closed_form("test_lq_lora.py::test_it_is_the_best_between_its_two_sides"),
    "quantize_adapter": closed_form(
        "test_adapters.py::test_dense_is_the_product_of_rounded_factors"
    ),
    "lrec": authors("test_lrec.py::test_the_step_takes_the_update_that_their_program_takes"),
    "apiq": authors("test_apiq.py::test_clips_adapters_and_codes_end_where_theirs_do"),
    "finetune": neither(
        "a task is no problem that a paper has numbers of; what it lowers is the decoder's "
        "next-token loss",
        f"{AUTHORS}/test_tiny_llama.py::test_the_next_token_loss_is_theirs",
    ),
    "rilq": authors("test_rilq.py::test_the_step_takes_the_update_that_their_program_takes"),
    "merge": closed_form("test_merge.py::test_a_shift_of_zeros_is_the_adapter_in_float64"),
}


def test_every_method_has_a_row_and_every_row_is_a_method():
    assert GOLDEN.keys() == METHODS.keys(), "a method and its row here come and go together"


@pytest.mark.parametrize("method", GOLDEN)
def test_a_row_names_a_test_that_there_is(method):
    kind, test, reason = GOLDEN[method]
    assert kind in ("authors", "closed form", "neither")
    assert bool(reason) == (kind == "neither")
    name, _, function = test.partition("::")
    files = [path for path in list_files() if path.as_posix().endswith(f"/{name}")]
    assert any(function in functions_of(path) for path in files), f"no {test} under tests/"


def test_few_have_neither():
    assert sum(source.kind == "neither" for source in GOLDEN.values()) <= len(GOLDEN) / 10


@cache
def list_files() -> list[Path]:
    return sorted(TESTS.rglob("test_*.py"))


@cache
def functions_of(path: Path) -> frozenset[str]:
    return frozenset(node.name for node in parse(path).body if isinstance(node, ast.FunctionDef))
