"""Chat templates are strangers' programs: whatever one does, a text or one short line comes out."""

import pytest

from lqec_jax.errors import InputError
from lqec_jax.io.sources import chat
from lqec_jax.io.sources.chat import read_template, render_chat

MESSAGES = [{"role": "user", "content": "Hé"}]


def render(template, **values):
    return render_chat(template, {"messages": MESSAGES, **values}, "the-model")


def refusal(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_a_template_sees_its_values_and_no_html_is_escaped():
    text = render("{{ a }}{% for m in messages %}<{{ m.role }}>{{ m | tojson }}{% endfor %}", a="&")
    assert text == '&<user>{"role": "user", "content": "Hé"}'


def test_templates_have_loop_controls_macros_and_the_mark_of_what_is_learned():
    template = (
        "{% macro m(x) %}[{{ x }}]{% endmacro %}"
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ m(i) }}{{ loop.last }}"
        "{% endfor %}{% generation %}{{ messages[0].content }}{% endgeneration %}"
    )
    assert render(template) == "[0]False[1]FalseHé"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ '{}'.format() }}", "IndexError"),
        ("{{ '{a}'.format() }}", "KeyError: 'a'"),
        ("{{ 'x'.encode('bogus') }}", "LookupError: unknown encoding: bogus"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ cycler() }}", "RuntimeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ none.x.y }}", "has no attribute"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "RecursionError"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
        ("{% include '/etc/hostname' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('no ' * 5000) }}", "no no no"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_template_that_fails_is_one_short_line(template, said):
    message = refusal(render, template)
    assert said in message and message.startswith("the-model: its chat template refused")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        # Memory that is asked for at once, and by doubling.
        ("{{ 'a' * 10**9 }}", "more memory"),
        ("{{ 'a'.ljust(10**9) }}", "more memory"),
        ("{{ '%1000000000d' % 1 }}", "more memory"),
        (
            "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
            "{% endfor %}",
            "more memory",
        ),
        ("{% for i in range(9000) %}{{ 'a' * 1000 }}{% endfor %}", "more than 4194304 characters"),
    ],
)
def test_a_template_without_measure_is_ended(template, said):
    assert said in refusal(render, template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(60) }}",
        "{% for i in [[1] * 99] * 99 recursive %}{{ loop(i) if i is iterable }}{% endfor %}",
    ],
)
def test_rounds_of_loops_and_calls_of_macros_are_counted(monkeypatch, template):
    monkeypatch.setattr(chat, "STEPS", 2000)
    assert "more than 2000 steps" in refusal(render, template)


@pytest.mark.parametrize(
    "template",
    [
        # Rounds that a condition leaves out are no steps, and one call into C is none.
        "{% for i in range(99999) if range(99999) | sum < 0 %}{% endfor %}",
        "{{ 7 ** (7 ** 10) % 2 }}",
    ],
)
def test_what_takes_no_steps_takes_time(monkeypatch, template):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    assert "does not end within 0.2 s of computing" in refusal(render, template)


def test_a_template_cannot_reach_its_counter(monkeypatch):
    monkeypatch.setattr(chat, "STEPS", 3)
    template = "{% set environment = 1 %}{% set step = 2 %}{% for i in range(N) %}x{% endfor %}"
    assert render(template, N=3) == "xxx"
    assert "more than 3 steps" in refusal(render, template, N=4)


def test_a_system_without_such_limits_has_a_clock(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 1e6)
    monkeypatch.setattr(chat, "CLOCK", 0.5)
    endless = "{% for i in range(99999) if range(99999) | sum < 0 %}{% endfor %}"
    assert "does not end within 0.5 s" in refusal(render, endless)


def test_a_renderer_that_dies_is_one_line(monkeypatch, tmp_path):
    dying = tmp_path / "worker.py"
    dying.write_text("import sys; sys.exit(7)")
    monkeypatch.setattr(chat, "_WORKER", dying)
    assert "its process ended with code 7" in refusal(render, "a")


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, b"x", 10**5000], ids=lambda value: type(value).__name__
)
def test_only_what_json_holds_goes_in(value):
    assert "cannot be handed to the chat template" in refusal(render, "a", value=value)
    loop = []
    loop.append(loop)
    assert "cannot be handed to the chat template" in refusal(render, "a", value=loop)


def test_a_template_has_a_length(tmp_path):
    assert "1048577 characters" in refusal(render, "a" * (2**20 + 1))
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"a" * (2**22 + 1))
    assert "holds 4194305 bytes" in refusal(read_template, path)


def test_a_template_file_is_utf8_and_its_line_ends_are_unix(tmp_path):
    path = tmp_path / "chat_template.jinja"
    path.write_bytes("é\r\n{{ 1 }}".encode())
    assert read_template(path) == "é\n{{ 1 }}"
    path.write_bytes(b"a\n\xed\xb3\xbf")
    assert f"{path}, line 2: not UTF-8" in refusal(read_template, path)


def test_the_cases_of_strangers_are_one_line_each(shared):
    folder = shared / "cases" / "chat-templates"
    if not folder.is_dir():
        pytest.skip("no folder ../shared/cases")
    paths = sorted(folder.glob("*.jinja"))
    assert len(paths) >= 8
    for path in paths:
        refusal(lambda path=path: render(read_template(path)))
