"""What is said of long work, on a terminal and into a pipe, with a clock that the test moves."""

import io
import re
import threading
from collections.abc import Callable

import pytest
import rich.console

from diffattn.cli.terminal import board as module
from diffattn.cli.terminal.board import Board
from diffattn.cli.terminal.console import Console
from diffattn.progress import Stage
from diffattn.train.callbacks import Progress

Wait = Callable[[float], None]


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Wait:
    """Moves the clock; the thread that looks at it stands still, and `tell` looks in its place."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module._Plain, "_watch", lambda self: None)

    def later(seconds: float) -> None:
        now[0] += seconds

    return later


def look(board: Board) -> None:
    assert isinstance(board._lines, module._Plain)
    board._lines._look()


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()


def test_a_line_for_each_stage_and_then_how_far_it_is(wait: Wait, capsys: pytest.CaptureFixture[str]) -> None:
    with Board() as board:
        board(Stage("reading the text"))
        wait(9)
        board(Stage("training the tokenizer", 0, 200))
        assert lines(capsys) == ["reading the text", "training the tokenizer"]
        for done in range(1, 101):
            wait(0.5)
            board(Stage("training the tokenizer", done, 200))
        said = lines(capsys)
        assert said[0] == "training the tokenizer: 10%, about 1 min 30 s left"
        assert said[-1] == "training the tokenizer: 50%, about 50 s left"
        assert len(said) == 5  # one in ten seconds, not a hundred
        board(Stage("building the model"))
        assert lines(capsys) == ["building the model"]


def test_what_a_killed_process_did_is_not_taken_for_speed(wait: Wait, capsys: pytest.CaptureFixture[str]) -> None:
    with Board() as board:
        board(Stage("turning the text into tokens", 900, 1000))
        wait(20)
        board(Stage("turning the text into tokens", 950, 1000))
        assert lines(capsys)[-1] == "turning the text into tokens: 95%, about 20 s left"


def test_a_stage_that_reports_nothing_is_heard_of_too(wait: Wait, capsys: pytest.CaptureFixture[str]) -> None:
    with Board() as board:
        board(Stage("compiling"))
        wait(5.5)
        look(board)
        assert lines(capsys) == []
        for _ in range(40):
            wait(1)
            look(board)
        assert lines(capsys) == [
            "compiling",
            *(f"compiling: {seconds} s so far" for seconds in (10, 20, 30, 40)),
        ]


def test_a_stage_that_begins_again_as_a_line_is_due_has_not_lasted_yet(
    wait: Wait, capsys: pytest.CaptureFixture[str]
) -> None:
    with Board() as board:
        for name in ("getting ready", "training", "getting ready"):
            board(Stage(name))
            wait(0.2)
            look(board)
            wait(9.9)
        board(Stage("training"))
        look(board)
    assert not any("µs" in line for line in lines(capsys))


def test_what_lasts_for_hours_says_so_once_a_minute(wait: Wait, capsys: pytest.CaptureFixture[str]) -> None:
    with Board() as board:
        board(Stage("waiting"))
        for _ in range(7200):
            wait(1)
            look(board)
    assert 120 < len(lines(capsys)) < 150


def test_a_mistake_that_is_found_at_once_is_one_line_alone(wait: Wait, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with Board() as board:
            board(Stage("importing torch"))
            wait(15)
            look(board)
            board(Stage("importing the server"))
            wait(15)
            look(board)
            board(Stage("reading the text"))
            wait(5)
            look(board)
            raise ValueError("mistake")

    with pytest.raises(ValueError, match="mistake"):
        work()
    assert lines(capsys) == []


def test_what_was_soon_over_is_said_behind_it_or_not_at_all(wait: Wait, capsys: pytest.CaptureFixture[str]) -> None:
    for keep, said in ((True, ["one", "two"]), (False, [])):
        with Board(keep=keep) as board:
            board(Stage("one"))
            board(Stage("two"))
        assert lines(capsys) == said


def test_lines_come_before_a_note_that_follows_them(wait: Wait, capsys: pytest.CaptureFixture[str]) -> None:
    with Board() as board:
        board(Stage("one"))
        board.note("a note, [bold] as it is")
        board(Stage("two"))
    assert lines(capsys) == ["one", "a note, [bold] as it is", "two"]


def test_a_run_and_the_measurements_within_it(wait: Wait, capsys: pytest.CaptureFixture[str]) -> None:
    with Console("train", None, resume=False) as console:
        for step in range(1, 41):
            wait(1)
            console.progress("softmax seed 0", Progress(step, 40, 5.0, 1000.0, 40.0 - step))
            if step % 10 == 0:
                for done in range(1, 4):
                    wait(1)
                    console(Stage("measuring the held-out loss", done, 3))
    said = lines(capsys)
    assert said[0] == "training softmax seed 0: 40 steps"
    assert said.count("measuring the held-out loss") == 1
    assert sum("step " in line for line in said) >= 3
    assert not any("0:00 left" in line for line in said)
    assert len(said) <= 2 + 52 / 10


def test_studies_say_how_much_is_left(wait: Wait, capsys: pytest.CaptureFixture[str]) -> None:
    with Console("eval noise", None, resume=False, kept="nothing") as console:
        for done in range(1, 31):
            wait(1)
            console.counted("m", done, 60)
    said = lines(capsys)
    assert said[0] == "measuring m"
    assert re.fullmatch(r"m +11 of 60  about 49 s left", said[1])


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    console = rich.console.Console(file=written, force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr(module, "screen", lambda: console)
    return written


def left_behind(terminal: io.StringIO) -> list[str]:
    """What stands on the terminal at the end: lines are erased upwards before they are drawn again."""
    shown: list[str] = []
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\n|\r)", terminal.getvalue()):
        if part == "\x1b[1A":
            shown.pop()
        elif part == "\x1b[2K":
            shown[-1:] = [""]
        elif part == "\n":
            shown.append("")
        elif part and part != "\r" and not part.startswith("\x1b"):
            shown[-1:] = [(shown[-1] if shown else "") + part]
    return [line.strip() for line in shown if line.strip()]


def test_a_terminal_keeps_what_took_long(wait: Wait, terminal: io.StringIO) -> None:
    with Console("train", None, resume=False) as console:
        console(Stage("reading the text"))
        wait(0.2)
        console(Stage("training the tokenizer", 1, 2))
        wait(12)
        console(Stage("building the model"))
        wait(0.1)
        for step in (1, 2):
            console.progress("softmax seed 0", Progress(step, 2, 5.0, 1000.0, 2.0 - step))
            wait(3)
            console(Stage("measuring the held-out loss", 1, 2))
        console.note("done")
    run = "✓ softmax seed 0   step 2/2  loss 5.000  1,000 tokens/s"
    assert left_behind(terminal) == ["done", "✓ training the tokenizer: 12 s", run]
    assert "measuring the held-out loss: 50%" in terminal.getvalue()


def test_a_terminal_is_left_without_what_failed(wait: Wait, terminal: io.StringIO) -> None:
    def work() -> None:
        with Board() as board:
            board(Stage("reading the text"))
            wait(2)
            raise ValueError("mistake")

    with pytest.raises(ValueError, match="mistake"):
        work()
    assert left_behind(terminal) == []


def test_a_terminal_is_free_for_text_once_it_is_closed(wait: Wait, terminal: io.StringIO) -> None:
    with Board(keep=False) as board:
        board(Stage("loading the model"))
        wait(4)
        board.close()
        assert left_behind(terminal) == []


def test_the_thread_looks_by_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    heard = threading.Event()
    monkeypatch.setattr(module, "HELD_SECONDS", 0.0)
    monkeypatch.setattr(module, "SOONEST", 0.0)
    board = Board()
    monkeypatch.setattr(board.screen, "print", lambda *words, **options: heard.set())
    with board:
        board._lines.show("one", "", first="one", passing=True)
        heard.clear()
        assert heard.wait(20)
