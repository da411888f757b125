"""`lqec finetune`: adapters, or scales, on a task; the base stays packed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lqec_jax.cli.options import (
    ArtifactOut,
    Check,
    Dtype,
    Overwrite,
    Quiet,
    ReportJson,
    Resume,
    argument,
    option,
)

Artifact = argument(str, "An artifact, as `lqec compress` writes it.")
Data = option(
    str,
    "FILE.jsonl",
    'Rows {"text": ...}, all of it learned, or {"prompt": ..., "completion": ...}, of which the '
    "completion is.",
)
Val = option(str | None, "FILE.jsonl", "Rows to look at. [default: the last tenth of --data]")
ValRatio = option(float, "X", "Their share of --data.")
Seqlen = option(
    int | None, "N", "Longest row in tokens; what is longer loses its end. [default: 512]"
)
Train = option(str, "WHAT", "adapters, adapters+norms, adapters+rest, scales or scales+zeros.")
Rank = option(
    str | None, "R", "Of new adapters, where the model has none: 16, or a fraction as 0.1."
)
Epochs = option(float | None, "X", "Passes over the rows. [default: 3]")
Updates = option(int | None, "N", "In place of --epochs.")
Batch = option(int | None, "N", "Rows an update. [default: 8]")
Lr = option(float | None, "X", "The highest learning rate. [default: 0.256 over the model's width]")
Warmup = option(float | None, "X", "Share of the updates in which it rises. [default: 0.05]")
Decay = option(str | None, "D", "cosine, linear or constant. [default: cosine]")
Optimizer = option(str | None, "O", "adamw, adam or adafactor. [default: adamw]")
WeightDecay = option(float | None, "X", "[default: 0]")
Patience = option(
    int | None, "N", "Stops after so many looks without a new best; 0 never does. [default: 5]"
)
EvalEvery = option(int | None, "N", "Updates between two looks. [default: a twentieth of them]")
Preset = option(
    str | None, "P", "slim: its authors' settings, Adafactor, 469 updates of 64. [default: ours]"
)
Seed = option(int, "N")


def finetune(
    model: Artifact,
    out: ArtifactOut,
    *,
    data: Data,
    val: Val = None,
    val_ratio: ValRatio = 0.1,
    seqlen: Seqlen = None,
    train: Train = "adapters",
    rank: Rank = None,
    epochs: Epochs = None,
    updates: Updates = None,
    batch: Batch = None,
    lr: Lr = None,
    warmup: Warmup = None,
    decay: Decay = None,
    optimizer: Optimizer = None,
    weight_decay: WeightDecay = None,
    patience: Patience = None,
    eval_every: EvalEvery = None,
    preset: Preset = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    check: Check = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: ReportJson = None,
    quiet: Quiet = False,
) -> None:
    """Train a compressed model's adapters, or its scales, on examples; the base stays packed.

    Rows begin with the tokenizer's BOS and end with its EOS, where it has them. Adapters of the
    model are where training begins, quantized ones included; --rank adds new ones to a model
    without.
    """
    from lqec_jax.cli.compress import _resumable
    from lqec_jax.cli.printing import STDOUT, check_json, write_json
    from lqec_jax.cli.progress import reporting

    check_json(json)
    settings = {"train": train, "rank": _read_rank(rank), "epochs": epochs, "updates": updates,
                "batch": batch, "lr": lr, "warmup": warmup, "decay": decay, "patience": patience,
                "optimizer": optimizer, "weight_decay": weight_decay,
                "eval_every": eval_every, "preset": preset}  # fmt: skip
    with _resumable(out):
        from lqec_jax import api

        with reporting(quiet) as reporter:
            tuned = api.finetune(model, data, val=val, val_ratio=val_ratio, seqlen=seqlen,
                                 seed=seed, dtype=dtype, check=check, out=out, resume=resume,
                                 overwrite=overwrite, reporter=reporter, **settings)  # fmt: skip
    if json is not None:
        write_json(json, tuned.report)
    if json != STDOUT and not quiet:
        _print_fit(tuned.report, out)


def _read_rank(rank: str | None) -> int | float | None:
    """Reads '16' as a number and '0.1' as a fraction, and leaves anything else to be refused."""
    if rank is None:
        return None
    from lqec_jax.errors import InputError

    try:
        return float(rank) if "." in rank else int(rank)
    except ValueError:
        raise InputError(
            f"finetune: rank={rank!r}; an integer >= 1 or a fraction in (0, 1] was wanted"
        ) from None


def _print_fit(report: Mapping[str, Any], out: Path) -> None:
    from lqec_jax.cli.printing import format_number, print_line

    fit = report["fits"][-1]
    looks = {point["update"]: format_number(point["val_loss"]) for point in fit["history"]}
    best, last = fit["best_update"], fit["history"][-1]["update"]
    print_line(
        f"loss of a learned token on the rows to look at: {looks[0]} before, {looks[best]} at its "
        f"best, update {best} of {last}"
    )
    for note in fit["notes"]:
        print_line(note)
    print_line(f"{report['bits_per_weight']:.4f} bits per weight; written to {out}")
