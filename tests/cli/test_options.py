"""Options are declared in one way, and the shared ones are shared."""

import ast
from typing import Annotated, get_args, get_origin

import typer
from typer.testing import CliRunner

from lqec_jax.cli import options
from lqec_jax.cli.options import argument, flag, json_of, option
from tests.sources import PACKAGE, imported, name_of, parse


def run(command, *arguments: str):
    app = typer.Typer(rich_markup_mode=None)
    app.command()(command)
    return CliRunner().invoke(app, arguments)


def test_an_option_is_named_by_its_parameter_unless_it_says_otherwise():
    seen = []

    def command(
        model: argument(str, "A model."),
        *,
        top_p: option(float, "P", "A share.") = 1.0,
        settings: option(list[str] | None, "A=B", "Settings.", "--set") = None,
        json: json_of("The rows") = None,
        again: flag("--again", "Anew.", "-a") = False,
    ) -> None:
        seen.append((model, top_p, settings, json, again))

    assert run(command, "m").exit_code == 0
    found = run(command, "m", "--top-p", "0.5", "--set", "a=1", "--set", "b=2", "--json", "f", "-a")
    assert found.exit_code == 0, found.output
    assert seen[0][1:2] + seen[0][3:] == (1.0, None, False)
    assert seen[1] == ("m", 0.5, ["a=1", "b=2"], "f", True)
    out = run(command, "--help").output
    for words in ("--top-p P", "--set A=B", "--json [FILE]", "The rows as JSON, to FILE or",
                  "-a, --again", "A model."):  # fmt: skip
        assert words in out, out
    assert "--no-again" not in out


def test_no_command_declares_options_in_another_way():
    # `--version` of the program itself runs a callback.
    others = ("lqec_jax/cli/options.py", "lqec_jax/cli/app.py")
    assert not [
        name_of(path)
        for path in PACKAGE
        if "typing.Annotated" in set(imported(parse(path))) and name_of(path) not in others
    ]


def test_a_shared_option_is_shared():
    shared = {name for name, value in vars(options).items() if get_origin(value) is Annotated}
    taken = [
        module.rpartition(".")[2]
        for path in PACKAGE
        for module in imported(parse(path))
        if module.startswith("lqec_jax.cli.options.")
    ]
    assert shared and {name for name in shared if taken.count(name) < 2} == set()
    assert all(len(get_args(getattr(options, name))) == 2 for name in shared)


def test_no_option_is_declared_twice():
    declared: dict[str, list[str]] = {}
    for path in PACKAGE:
        if not name_of(path).startswith("lqec_jax/cli/"):
            continue
        for node in parse(path).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                if getattr(node.value.func, "id", "") in ("option", "flag", "argument", "json_of"):
                    text = ast.unparse(node.value)
                    declared.setdefault(text, []).append(name_of(path))
    assert not {text: paths for text, paths in declared.items() if len(paths) > 1}
