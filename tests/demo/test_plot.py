"""The demo's picture."""

import struct

import numpy as np

from lqec_jax.demo.plot import draw_demo

ROWS = [
    {"name": name, "bits_per_weight": bits, "ppl": ppl, "protocol": "documents/256"}
    for name, bits, ppl in (("teacher", 16, 10.0), ("rtn", 2.5, 90.0), ("svd", 4.0, 70.0),
                            ("rilq", 4.0, 14.0))
]  # fmt: skip
HISTORY = [
    {"update": update, "train_loss": loss, "val_loss": 1.0}
    for update, loss in ((0, None), (25, 2.0), (50, 1.5))
]
RESULT = {"rows": ROWS, "fits": [{"method": "rilq", "history": HISTORY, "best_update": 25}]}


def test_the_picture_is_a_png_with_something_on_it(tmp_path):
    draw_demo(tmp_path / "demo.png", RESULT)
    data = (tmp_path / "demo.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1350, 540)


def test_bars_and_curves_show_the_numbers():
    from matplotlib.figure import Figure

    from lqec_jax.demo.plot import _draw_bars, _draw_losses

    bars, losses = Figure().subplots(1, 2)
    _draw_bars(bars, ROWS)
    _draw_losses(losses, RESULT["fits"][0])
    assert [bar.get_height() for bar in bars.patches] == [10.0, 90.0, 70.0, 14.0]
    assert [text.get_text() for text in bars.texts] == ["10.0", "90.0", "70.0", "14.0"]
    train, val, kept = losses.lines
    np.testing.assert_array_equal(train.get_xydata(), [[25, 2.0], [50, 1.5]])
    assert len(val.get_xdata()) == 3
    assert list(kept.get_xdata()) == [25, 25]
