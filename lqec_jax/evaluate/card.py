"""README.md of an artifact: a model card, with the front matter that Hugging Face reads.

Only what is known is said: the base model where it came from the hub, a license where the base
model's own card names one. The card is made from the report alone, as the page is.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lqec_jax.evaluate.page import find_methods, tabulate_stages

CARD = "README.md"
CACHED = "models--"  # how the hub's cache begins a folder's name: models--org--name


def describe_base(folder: Path | None) -> dict[str, str]:
    """Returns what a folder says of the model in it: `name`, and if known `hub_id`, `license`.

    Args:
      folder: where the dense model was read from; None for one that was never on disk.
    """
    if folder is None:
        return {}
    place = folder.resolve()
    base, cached = {"name": place.name}, place.parent.parent.name
    if place.parent.name == "snapshots" and cached.startswith(CACHED):
        hub_id = cached.removeprefix(CACHED).replace("--", "/", 1)
        base = {"name": hub_id.rpartition("/")[2], "hub_id": hub_id}
    front = read_front_matter(place / CARD)
    return base | {
        name: front[name]
        for name in ("license", "license_name", "license_link")
        if isinstance(front.get(name), str)
    }


def read_front_matter(path: Path) -> dict[str, Any]:
    """Returns the YAML between the first two `---` lines of a card; {} where there is none."""
    import yaml

    if not path.is_file():
        return {}
    found = re.match(r"---\r?\n(.*?)\r?\n---", path.read_text("utf-8", errors="replace"), re.DOTALL)
    try:
        values = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:  # somebody else's card; nothing can be learned from it
        return {}
    return values if isinstance(values, dict) else {}


def render_card(report: Mapping[str, Any]) -> str:
    """Returns the model card of a report, as markdown.

    Args:
      report: as `report.build_report` returns it; any field may be missing.
    """
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    import yaml

    front = _front_matter(report)
    base, bits = report.get("base", {}), report.get("bits_per_weight")
    name = base.get("name")
    yield f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"
    size = f" at {bits:.2f} bits per weight" if bits is not None else ""
    yield f"\n# {name or 'A model'}{size}"
    origin = f"[{base['hub_id']}](https://huggingface.co/{base['hub_id']})" if (
        "hub_id" in base) else f"`{name}`" if name else "a dense model"  # fmt: skip
    yield f"\nMade from {origin} with `lqec_jax`, by the recipe\n"
    yield f"```\n{report.get('recipe', '')}\n```"
    for fit in report.get("fits", ()):
        if "data" in fit:
            yield f"\nThere `{fit['method']}` stands for a training on the rows of"
            yield f"`{fit['data']['file']}`, not on a calibration text."
    if "seed" in report:
        yield f"\nand seed {report['seed']}. The recipe is written with all its defaults."
    yield from _results(report)
    yield from _use()
    if report.get("skipped"):
        yield "\n## Left as it was\n"
        yield from (f"- `{entry['path']}`: {entry['reason']}." for entry in report["skipped"])


def _front_matter(report: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the card's metadata; what is unknown is absent."""
    base = report.get("base", {})
    front: dict[str, Any] = {"library_name": "lqec_jax", "pipeline_tag": "text-generation"}
    if "hub_id" in base:
        front |= {"base_model": base["hub_id"], "base_model_relation": "quantized"}
    for name in ("license", "license_name", "license_link"):
        if name in base:
            front[name] = base[name]
    methods = find_methods(report.get("recipe", ""))
    front["tags"] = list(dict.fromkeys(["lqec", "jax", "quantized", *methods]))
    return front


def _results(report: Mapping[str, Any]) -> Iterator[str]:
    tables = list(tabulate_stages(report.get("stages", ())))
    if not tables:
        return
    yield "\n## Results"
    for table in tables:
        yield f"\n| after | perplexity, `{table['protocol']}` | 95% interval |"
        yield "|---|---|---|"
        for row in table["rows"]:
            cells = (row["name"].replace("|", "\\|"), row["ppl"], row["interval"])
            yield f"| {' | '.join(cells)} |"
    yield "\nA protocol says how a text became windows, and their length; `calib-val` is the"
    yield "calibration text's own validation windows. Two protocols cannot be compared."
    yield "`report.html` shows the rest."


def _use() -> Iterator[str]:
    yield "\n## Use\n"
    yield "```python\nimport lqec_jax as lqec\n"
    yield 'model = lqec.load("path/to/this/folder")  # weights stay packed'
    yield "logits = lqec.logits(model, tokens)  # int [b, t] -> float32 [b, t, vocab]\n```"
