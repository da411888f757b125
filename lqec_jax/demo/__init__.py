"""A small Llama that comes with the package, and the main job on it."""

from pathlib import Path


def model_path() -> Path:
    """Returns the folder of the embedded model: a Hugging Face folder with two texts.

    `calib.jsonl` is a part of what it was trained on, `heldout.jsonl` is not; `training.json` says
    how it was made.
    """
    return Path(__file__).parent / "model"
