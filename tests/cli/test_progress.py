"""How far the work is: what a log gets, what a terminal gets, and when it will end."""

import io
import os
import pty
import subprocess
import sys

import pytest
from rich.console import Console

from lqec_jax.cli.progress import Bar, Log, Pace, format_seconds, reporting
from lqec_jax.core.progress import Silent


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_the_end_is_foretold_from_the_parts_of_this_run_alone():
    pace = Pace(total=10, done=4, now=0.0)
    assert pace.seconds_left(5.0) is None
    pace.advance(5, now=6.0)
    assert pace.seconds_left(6.0) == pytest.approx(30.0)  # 6 s a part, 5 parts left
    assert pace.seconds_left(16.0) == pytest.approx(20.0)  # and it runs while a part is at work
    assert pace.seconds_left(99.0) == 0.0
    pace.advance(5, now=16.0)  # only its message is new
    assert pace.seconds_left(16.0) == pytest.approx(20.0)
    pace.advance(10, now=36.0)
    assert pace.seconds_left(36.0) == 0.0


def test_a_log_gets_a_line_at_the_start_at_every_tenth_and_at_the_end():
    stream, clock = io.StringIO(), Clock()
    log = Log(stream, clock)
    log.begin("rilq", 40)
    for done in range(1, 41):
        clock.now += 2.0
        log.advance(done, f"loss {done}")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "rilq: 0/40"
    assert lines[1] == "rilq: 4/40, about 1 min 12 s left, loss 4"
    assert [line.split(",")[0] for line in lines[1:]] == [
        f"rilq: {done}/40" for done in range(4, 41, 4)
    ]
    assert lines[-1] == "rilq: 40/40, loss 40"


def test_slow_work_speaks_every_ten_seconds_and_fast_work_hardly():
    stream, clock = io.StringIO(), Clock()
    log = Log(stream, clock)
    log.begin("slow", 1000)
    for done in range(1, 21):
        clock.now += 4.0
        log.advance(done)
    assert len(stream.getvalue().splitlines()) == 1 + 6  # 80 s, a line every third part
    stream.truncate(0)
    log.begin("fast", 1000)
    for done in range(1, 1001):
        clock.now += 0.001
        log.advance(done)
    assert [line.strip("\0") for line in stream.getvalue().splitlines()] == [
        "fast: 0/1000",
        "fast: 1000/1000",
    ]


def test_a_resumed_task_begins_where_it_was():
    stream, clock = io.StringIO(), Clock()
    log = Log(stream, clock)
    log.begin("rtn", 30, 29)
    clock.now += 60
    log.advance(30)
    log.say("rtn: perplexity 3.0291")
    assert stream.getvalue() == "rtn: 29/30\nrtn: 30/30\nrtn: perplexity 3.0291\n"


def test_a_terminal_gets_a_bar():
    stream = io.StringIO()
    with Bar(Console(file=stream, force_terminal=True, width=100)) as bar:
        bar.begin("rtn | [svd]", 5, 2)
        bar.advance(4, "[red]")
        bar.say("teacher: perplexity 2.0412 [x]")
        bar.begin("rilq", 7)
        bar.advance(7)
    text = stream.getvalue()
    for part in ("rtn | [svd]", "4/5", "about 0 s left", "[red]", "2.0412 [x]", "rilq", "7/7"):
        assert part in text


def test_quiet_is_silent_and_a_pipe_gets_lines(capsys):
    with reporting(quiet=True) as reporter:
        assert isinstance(reporter, Silent)
        reporter.begin("task", 2)
        reporter.advance(2)
        reporter.say("words")
    assert capsys.readouterr() == ("", "")
    with reporting(quiet=False) as reporter:
        assert isinstance(reporter, Log)
        reporter.begin("task", 2)
    assert capsys.readouterr() == ("", "task: 0/2\n")


def test_on_a_real_terminal_the_bar_is_drawn_to_standard_error():
    script = (
        "from lqec_jax.cli.progress import reporting\n"
        "with reporting(quiet=False) as reporter:\n"
        "    reporter.begin('task', 3)\n"
        "    reporter.advance(1)\n"
        "    reporter.advance(3)\n"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    os.close(theirs)
    drawn = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert (done.returncode, done.stdout) == (0, b"")
    assert "3/3" in drawn and "\x1b[" in drawn


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (3599.7, "1 h 0 min"),
     (7267, "2 h 1 min")],
)  # fmt: skip
def test_durations_have_two_units(seconds, text):
    assert format_seconds(seconds) == text
