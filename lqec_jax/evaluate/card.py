"""README.md of an artifact: a model card, with the front matter that Hugging Face reads.

Only what is known is said: the base model where it came from the hub, a license where the base
model's own card names one. The card is made from the report alone, as the page is. Names in it may
be strangers': what Markdown or HTML would read as its own is written so that it is only shown.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lqec_jax.core.hub_cache import find_repository, read_hub_id
from lqec_jax.errors import InputError, shorten
from lqec_jax.evaluate.page import PAGE, find_methods, render_report, tabulate_stages

CARD = "README.md"
_log = logging.getLogger(__name__)


def render_pages(
    report: Mapping[str, Any], say: Callable[[str], None] = _log.warning
) -> dict[str, str]:
    """Returns what people read of a report, by the name of the file: the page and the card.

    A page that cannot be made is left out and said: it decides nothing of what it is about.

    Args:
      report: as `report.build_report` returns it; any field may be missing.
    """
    pages = {}
    for name, make in ((PAGE, render_report), (CARD, render_card)):
        with say_failure(name, say):
            pages[name] = make(report)
    return pages


@contextmanager
def say_failure(name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Lets a result be kept whose page could not be made: says so, and goes on."""
    try:
        yield
    except (OSError, InputError):  # of the disk, of what is asked for: no page's own
        raise
    except Exception as error:
        what = " ".join(str(error).split())
        fault = f"{name} could not be written ({type(error).__name__}: {what}"
        say(f"{shorten(fault)}); all else is")


def check_drawn(report: Mapping[str, Any], folder: Path | None) -> None:
    """Refuses a report, of this folder, that cannot be drawn, before one is made that goes on it.

    Raises:
      InputError: it is damaged.
    """
    try:
        render_report(report), render_card(report)
    except Exception as error:  # whatever is wrong with a page
        raise InputError(
            f"{folder}: report.json is damaged ({type(error).__name__}: {error}); restore it, or "
            "move it away: the weights do not need it"
        ) from error


def describe_base(folder: Path | None) -> dict[str, str]:
    """Returns what a folder says of the model in it: `name`, and if known `hub_id`, `license`.

    Args:
      folder: where the dense model was read from; None for one that was never on disk.
    """
    if folder is None:
        return {}
    place = folder.resolve()
    base, repository = {"name": place.name}, find_repository(place)
    if repository is not None:
        hub_id = read_hub_id(repository)
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
    yield f"\n# {_plain(name) if name else 'A model'}{size}"
    if "hub_id" in base:
        origin = f"[{_plain(base['hub_id'])}](https://huggingface.co/{quote(base['hub_id'])})"
    else:
        origin = _code(name) if name else "a dense model"
    yield f"\nMade from {origin} with `lqec_jax`, by the recipe\n"
    recipe = str(report.get("recipe", ""))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0))
    yield f"{fence}\n{recipe}\n{fence}"
    for fit in report.get("fits", ()):
        if "data" in fit:
            yield f"\nThere {_code(fit['method'])} stands for a training on the rows of"
            yield f"{_code(fit['data']['file'])}, not on a calibration text."
    if "seed" in report:
        yield f"\nand seed {report['seed']}. The recipe is written with all its defaults."
    yield from _results(report)
    yield from _use()
    if report.get("skipped"):
        yield "\n## Left as it was\n"
        for entry in report["skipped"]:
            yield f"- {_code(entry['path'])}: {_plain(entry['reason'])}."


def _plain(text: Any) -> str:
    """Writes a text so that Markdown shows it: no HTML, link, span, cell or line of its own."""
    one_line = " ".join(str(text).split())
    return re.sub(r"[<>&`*\[\]\\|]", lambda found: f"&#{ord(found[0])};", one_line)


def _code(text: Any) -> str:
    """Writes a text as code; in a span of backticks no character could be escaped."""
    shown = _plain(text)
    return f"`{shown}`" if shown == str(text) else f"<code>{shown}</code>"


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
        yield f"\n| after | perplexity, {_code(table['protocol'])} | 95% interval |"
        yield "|---|---|---|"
        for row in table["rows"]:
            name = " \\| ".join(_plain(step) for step in row["name"].split(" | "))
            cells = (name, row["ppl"], row["interval"])
            yield f"| {' | '.join(cells)} |"
    yield "\nA protocol says how a text became windows, and their length; `calib-val` is the"
    yield "calibration text's own validation windows. Two protocols cannot be compared."
    yield "`report.html` shows the rest."


def _use() -> Iterator[str]:
    yield "\n## Use\n"
    yield "```python\nimport lqec_jax as lqec\n"
    yield 'model = lqec.load("path/to/this/folder")  # weights stay packed'
    yield "logits = lqec.logits(model, tokens)  # int [b, t] -> float32 [b, t, vocab]\n```"
