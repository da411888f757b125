"""Renders one chat template, in a process that does nothing else and whose limits end it.

`chat.py` runs this file by its path; it knows the standard library and jinja2 only, and may import
nothing of ours. A request comes as JSON on standard input, the answer goes as JSON to standard
output: `{"text": ...}` or `{"refused": reason}`. jinja2's sandbox keeps a template from Python; it
bounds neither memory nor time, so the process does: a single call into C, as of `10 ** 10 ** 8`,
can only be ended from outside.
"""

import json
import sys
from contextlib import suppress
from typing import Any


def limit_process(memory: int, seconds: float) -> None:
    """Bounds this process: bytes of memory, no file and no core written, seconds of CPU.

    CPU time, not the clock's: a busy machine refuses no template. Where the system knows no such
    limit, the one who started the process has a clock.
    """
    with suppress(ImportError):
        import resource
        import signal

        for kind, most in (("AS", memory), ("FSIZE", 0), ("CORE", 0)):
            with suppress(ValueError, OSError):
                resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
        signal.setitimer(signal.ITIMER_PROF, seconds)


def render(template: str, values: dict, *, characters: int, steps: int) -> str:
    """Renders a template; any exception of a template's making may come out of it.

    Args:
      values: what the template sees by name.
      characters: of output, at most.
      steps: rounds of loops and calls of macros, at most.
    """
    from jinja2 import TemplateError

    text, length = [], 0
    for piece in make_environment(steps).from_string(template).generate(**values):
        length += len(piece)
        if length > characters:
            raise TemplateError(f"it writes more than {characters} characters")
        text.append(piece)
    return "".join(text)


def make_environment(steps: int) -> Any:
    """Returns the environment that chat templates are written for, sandboxed, its steps counted."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Renders `{% generation %}`, the mark of what is learned, as its body."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Counting(ImmutableSandboxedEnvironment):
        """Counts each round of a loop and each call of a macro."""

        left = steps

        @property
        def step(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise TemplateError(f"it takes more than {steps} steps")

        def _parse(self, source, name, filename):
            tree = super()._parse(source, name, filename)
            for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
                # Of the environment, so that no variable of the template can take its place; read
                # and not called, which costs a tenth.
                counter = nodes.EnvironmentAttribute("step", lineno=node.lineno)
                node.body.insert(0, nodes.ExprStmt(counter, lineno=node.lineno))
            return tree.set_environment(self)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = Counting(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = dump
    environment.globals["raise_exception"] = refuse
    return environment


def dump(value: Any, indent: int | None = None) -> str:
    # jinja's own tojson escapes HTML, which no chat model was trained on.
    return json.dumps(value, indent=indent, ensure_ascii=False)


def explain(error: Exception) -> str:
    """Returns an error in one line of at most 200 characters."""
    from jinja2 import TemplateError

    if isinstance(error, MemoryError):
        return "it takes more memory than it may"
    said = " ".join(str(error)[:1000].split())
    named = isinstance(error, TemplateError) and said
    return (said if named else f"{type(error).__name__}: {said}".removesuffix(": "))[:200]


def main() -> None:
    limits = json.loads(sys.argv[1])
    sys.path += limits["path"]
    import jinja2  # noqa: F401  # read before limits count

    limit_process(limits["memory"], limits["seconds"])
    try:
        asked = json.load(sys.stdin)
        sizes = {name: limits[name] for name in ("characters", "steps")}
        answer = {"text": render(asked["template"], asked["values"], **sizes)}
    except Exception as error:
        answer = {"refused": explain(error)}
    sys.stdout.write(json.dumps(answer))  # ASCII: whatever a template wrote passes any pipe


if __name__ == "__main__":
    main()
