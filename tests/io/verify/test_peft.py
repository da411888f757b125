"""The adapter reader on factors worked out by hand."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lqec_jax.errors import InputError
from lqec_jax.io.verify import peft


def write(folder, name="base_model.model.x.q.lora_{}.weight", **changes):
    said = {"r": 2, "lora_alpha": 2, "target_modules": ["q"], "rank_pattern": {},
            "alpha_pattern": {}, "use_rslora": False}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said | changes))
    factors = {"A": np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]], np.float16),
               "B": np.array([[1.0, 3.0], [0.0, -1.0]], np.float16)}  # fmt: skip
    tensors = {name.format(half): array for half, array in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return peft.read(folder, {})


def test_the_product_is_added(tmp_path):
    found = write(tmp_path)
    assert list(found) == ["x.q.weight"]
    assert found["x.q.weight"]().tolist() == [[1.0, 3.0, 2.0], [0.0, -1.0, 0.0]]


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"lora_alpha": 6}, 3.0),
        ({"lora_alpha": 4, "alpha_pattern": {"x.q": 1}}, 0.5),
        ({"r": 9, "rank_pattern": {"q": 2}}, 1.0),
        ({"use_rslora": True, "lora_alpha": 2}, 2**0.5),
    ],
)
def test_it_is_scaled_by_alpha_over_rank(tmp_path, changes, factor):
    np.testing.assert_allclose(write(tmp_path, **changes)["x.q.weight"]()[0, 0], factor, rtol=1e-6)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(InputError, match="rank 3, its file 2"):
        write(tmp_path, r=3)["x.q.weight"]()
    with pytest.raises(InputError, match="no target names x.q"):
        write(tmp_path, target_modules=["k"])
    with pytest.raises(InputError, match="no half of an adapter"):
        write(tmp_path, name="x.q.lora_{}.weight")
