"""analysis.html: every number of the analysis, by scope and by kind."""

from lqec_jax.evaluate.rank_page import find_spreads, render_ranks, show_rank, tabulate_spectra


def row(scope, rank, nll):
    return {"scope": scope, "rank": rank, "bits_per_weight": 2.5, "ppl": 9.0, "kl": 0.25,
            "nll": nll, "relative_error": 0.125, "train_mse": 2 * nll, "held_out_mse": 3 * nll,
            "held_out_by_block": [0.1, 0.2], "seconds": 12.3}  # fmt: skip


def error(kind, layer, half):
    return {"kind": kind, "layer": layer, "d_in": 32, "d_out": 64, "relative_error": 0.1,
            "stable_rank": 8.0, "half": half, "most": 20, "ranks": [1, 2, 32],
            "captured": [0.1, 0.2, 1.0], "noise": [0.05, 0.1, 1.0]}  # fmt: skip


ROWS = [row("", None, 2.0), row("weight", 2, 1.5), row("weight", 8, 1.25), row("model", 2, 0.75),
        row("model", 8, 0.5)]  # fmt: skip
ANALYSIS = {
    "model": "<tiny>", "base": "rtn(bits=2)", "protocol": "documents/32", "rows": ROWS,
    "spectra": [error(kind, layer, 4 + layer) for kind in ("q", "up") for layer in (0, 1)],
    "teacher": {"ppl": 2.5},
}  # fmt: skip


def test_a_scopes_spread_is_the_largest_minus_the_smallest():
    assert list(find_spreads(ROWS)) == [
        {"scope": "weight", "nll": "0.2500", "train_mse": "0.5000", "held_out_mse": "0.7500"},
        {"scope": "model", "nll": "0.2500", "train_mse": "0.5000", "held_out_mse": "0.7500"},
    ]


def test_kinds_are_means_over_blocks():
    rows = list(tabulate_spectra(ANALYSIS["spectra"]))
    assert [row["kind"] for row in rows] == ["q", "up"]
    assert (rows[0]["half"], rows[0]["shape"]) == ("4.5", "32 x 64")


def test_a_row_without_an_adapter_is_named():
    assert (show_rank(ROWS[0])["scope"], show_rank(ROWS[0])["rank"]) == ("no adapter", "")


def test_the_page_is_whole_escaped_and_the_same_again():
    page = render_ranks(ANALYSIS)
    assert page == render_ranks(ANALYSIS)
    assert "&lt;tiny&gt;: what a rank buys" in page and "<tiny>" not in page
    assert page.count("<svg") == 7 and "documents/32" in page
    for text in ("no adapter", "weight", "model", "0.2500", "4.5", "(independent errors)"):
        assert text in page
