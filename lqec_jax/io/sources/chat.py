"""Chat templates, which are programs from strangers: the one place where one is run.

A template is rendered by jinja2's sandbox in a process of its own (`chat_worker`), with limits of
memory, of CPU time, of steps (rounds of loops, calls of macros) and of what it writes. Whatever it
does, its caller gets a text or an `InputError`.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lqec_jax.errors import InputError

CHARACTERS = 2**22  # of a rendered conversation: a million tokens
TEMPLATE_CHARACTERS = 2**20
STEPS = 200_000
SECONDS = 1.0  # of CPU time; the longest templates known take milliseconds
MEMORY = 2**29  # bytes, the interpreter's own included
CLOCK = 60.0  # seconds, for a system that cannot bound CPU time

_WORKER = Path(__file__).with_name("chat_worker.py")
_TIME_SIGNALS = {getattr(signal, name, None) for name in ("SIGPROF", "SIGXCPU", "SIGVTALRM")}


def render_chat(template: str, values: Mapping[str, Any], where: str | Path) -> str:
    """Renders a chat template.

    Args:
      values: what it sees by name, `messages` among them; what JSON can hold.
      where: what an error names, the model's folder.
    Raises:
      InputError: the template is too long, damaged, fails, refuses the conversation or passes a
        limit; a value is nothing that JSON can hold.
    Cost: starts a process, a tenth of a second.
    Example:
      >>> render_chat("{{ messages[0].content }}", {"messages": [{"content": "Hi"}]}, "model")
      'Hi'
    """
    if len(template) > TEMPLATE_CHARACTERS:
        raise _refusal(where, f"it has {len(template)} characters, {TEMPLATE_CHARACTERS} at most")
    try:
        request = json.dumps({"template": template, "values": values}, default=_as_json)
    except (TypeError, ValueError, RecursionError) as err:
        reason = " ".join(str(err).split())[:200]
        raise InputError(
            f"{where}: a message cannot be handed to the chat template ({reason}); wanted strings, "
            "numbers, lists and objects, as JSON has them"
        ) from err
    answer = _ask(request, where)
    if "refused" in answer:
        raise _refusal(where, answer["refused"])
    return answer["text"]


def read_template(path: Path) -> str:
    """Reads a file that holds one template.

    Raises:
      InputError: it is too long, or not UTF-8.
    """
    with path.open("rb") as file:
        content = file.read(4 * TEMPLATE_CHARACTERS + 1)  # UTF-8 takes 4 bytes at most
    if len(content) > 4 * TEMPLATE_CHARACTERS:
        raise _refusal(path.parent, f"{path.name} holds {path.stat().st_size} bytes")
    try:
        return content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as err:
        line = content[: err.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text; restore the file") from err


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"it holds a {type(value).__name__}")


def _ask(request: str, where: str | Path) -> dict[str, str]:
    """Returns what the worker answers, or raises for a worker that did not."""
    limits = {"characters": CHARACTERS, "steps": STEPS, "seconds": SECONDS, "memory": MEMORY}
    packages = {str(Path(find_spec(name).origin).parents[1]) for name in ("jinja2", "markupsafe")}
    # Isolated: no settings, start-up files or packages of the user's take part.
    command = [
        sys.executable,
        "-I",
        "-S",
        str(_WORKER),
        json.dumps({**limits, "path": [*packages]}),
    ]
    try:
        done = subprocess.run(
            command, input=request.encode(), capture_output=True, timeout=CLOCK, check=False
        )
    except subprocess.TimeoutExpired:
        raise _refusal(where, f"it does not end within {CLOCK:g} s") from None
    except OSError as err:
        raise InputError(
            f"{where}: no process for its chat template could be started ({err.strerror}); free "
            "some memory, or give the prompt as plain text"
        ) from err
    if -done.returncode in _TIME_SIGNALS:
        raise _refusal(where, f"it does not end within {SECONDS:g} s of computing")
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise _refusal(where, f"its process ended with code {done.returncode}") from None


def _refusal(where: str | Path, reason: str) -> InputError:
    return InputError(
        f"{where}: its chat template refused the conversation ({reason}); change the messages or "
        "the template"
    )
