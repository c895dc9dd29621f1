"""The live display on a terminal: its rows are redrawn in place, and whatever else is said stays whole above them."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import warnings
import weakref

import pytest
from lightning_fabric.utilities.warnings import _custom_format_warning

from ekd_lightning.config import edge, output
from ekd_lightning.progress import UNSEEN, phase, reported_by, session, track

pyte = pytest.importorskip("pyte")
COLUMNS, ROWS = 80, 40


class Terminal:
    """A pseudo-terminal whose screen is kept."""

    def __init__(self, columns: int) -> None:
        self.screen = pyte.Screen(columns, ROWS)
        self._there, here = pty.openpty()
        fcntl.ioctl(here, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
        self.stream = os.fdopen(here, "w", encoding="utf-8")
        self.raw = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        feed = pyte.ByteStream(self.screen).feed
        while True:
            try:
                content = os.read(self._there, 1 << 16)
            except OSError:
                return
            self.raw += content
            feed(content)

    def lines(self) -> list[str]:
        """What the screen shows once all was written, without empty rows."""
        self.stream.close()
        self._reader.join(60)
        os.close(self._there)
        return [line.rstrip() for line in self.screen.display if line.strip()]


@pytest.fixture(autouse=True)
def unrecorded(monkeypatch):
    """Shows warnings as Python does where pytest records none."""
    monkeypatch.setattr(warnings, "showwarning", lambda *told: sys.stderr.write(warnings.formatwarning(*told[:4])))


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")

    def make(columns: int = COLUMNS) -> Terminal:  # called in the test: pytest sets the streams anew after fixtures
        made = Terminal(columns)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "stdout", made.stream)
        monkeypatch.setattr(sys, "stderr", made.stream)
        return made

    return make


def speak(log: logging.Logger) -> None:
    """Two phases, during which everybody talks."""
    with phase("training", 3) as training:
        for epoch in track(range(3), "epochs"):
            print(f"printed {epoch}")
            log.info("logged %d", epoch)
            log.info("epoch %d", epoch, extra=UNSEEN)
            training.advance()
            sys.stderr.write("half a ")
            sys.stderr.write(f"line {epoch}\n")
    with phase("test"):
        sys.stderr.write("10 %\r50 %\r100 %\n")
        log.warning("x" * (COLUMNS + 10))
        warnings.formatwarning = _custom_format_warning  # as at Lightning's import, meanwhile
        warnings.showwarning("mind\n  this", UserWarning, "/ekd_lightning/file.py", 130)


@pytest.mark.parametrize("keep", [True, False])
def test_every_line_of_the_screen_is_a_row_or_a_whole_line(terminal, keep):
    terminal, log = terminal(), logging.getLogger("test_terminal")
    log.propagate = False
    log.addHandler(edge.ConsoleLines(sys.stdout))
    log.setLevel(logging.INFO)
    try:
        with edge._shown(), session("training", "test", "evaluation", keep=keep):
            speak(log)
        log.info("afterwards")
    finally:
        log.handlers.clear()
    said = [line for n in range(3) for line in (f"printed {n}", f"logged {n}", f"half a line {n}")]
    said += ["100 %", "warning: " + "x" * (COLUMNS - 9), "x" * 19, "warning: mind this"]
    found = terminal.lines()
    rows = [line.split()[0] for line in found[len(said) : -1]]
    assert found[: len(said)] == said
    assert rows == (["training", "test", "evaluation", "total"] if keep else [])
    assert found[-1] == "afterwards"
    assert (sys.stdout, sys.stderr) == (terminal.stream, terminal.stream)


@pytest.mark.parametrize("columns", [COLUMNS, 100, 120])
def test_the_scores_of_an_epoch_fit_on_a_terminal(terminal, columns):
    terminal, scores = terminal(columns), "loss 161.16  accuracy 0.7155  val/accuracy 0.7250"
    names = ("data", "teachers", "training", "test", "evaluation")
    with reported_by(edge.OnScreen()), session(*names), phase("training", 9, None) as training:
        training.advance(note="epoch 112/200")
        training.scores = f"{scores}  2,345 images/s"
    said = " ".join(["epoch 112/200", *scores.split(), *(["2,345 images/s"] if columns == 120 else [])])
    assert any(said in " ".join(line.split()) for line in terminal.lines())


def test_what_is_refused_at_once_leaves_no_rows(terminal):
    terminal = terminal()
    with (
        pytest.raises(ValueError, match="no"),
        reported_by(edge.OnScreen()),
        session("data", "training"),
        phase("data"),
    ):
        raise ValueError("no")
    assert terminal.lines() == []


def test_what_the_terminal_adds_to_the_last_row_leaves_nothing_behind(terminal):
    terminal = terminal()
    with reported_by(edge.OnScreen()), session("data", "training", keep=False), phase("data"):
        os.write(terminal.stream.fileno(), b"^C^C")  # as it shows Ctrl-C
    assert terminal.lines() == []


def test_numbers_of_a_narrow_table_stay_whole(terminal):
    terminal = terminal()
    rows = [("a name of more than forty letters, say so", "10.28", "1,223,854", "27.2 M", "18", "123")]
    output.print_table(
        "runs", ("", "test accuracy %", "parameters", "MACs", "training s", "images/s"), rows, left=("",)
    )
    said = "\n".join(terminal.lines())
    for whole in (*rows[0][1:], "accuracy", "parameters", "training", "images/s"):
        assert whole in said


@pytest.mark.parametrize("live", [True, False])
def test_a_session_that_has_ended_is_not_kept(terminal, live):
    terminal = terminal()
    with reported_by(edge.OnScreen()):
        with session("data", live=live, keep=False) as shown, phase("data"):
            ended = weakref.ref(shown)
            drawing = [one for one in threading.enumerate() if type(one).__name__ == "_RefreshThread"]  # rich's
        del shown
        while drawing:  # a thread that has left the list of threads may still hold what it ran
            drawing.pop().join(60)
        gc.collect()
        assert ended() is None
    assert terminal.lines() == []


def test_what_patches_the_streams_once_hears_each_line_once_in_every_session(terminal, monkeypatch):
    """As wandb does at its import."""
    terminal, heard = terminal(), {"stdout": [], "stderr": []}
    with reported_by(edge.OnScreen()):
        for job in range(2):
            with session("training", keep=False), phase("training"):
                for name, lines in heard.items() if job == 0 else ():
                    stream = getattr(sys, name)

                    def write(text, write=stream.write, lines=lines):
                        lines.append(text)
                        return write(text)

                    monkeypatch.setattr(stream, "write", write)
                sys.stdout.write(f"out {job}\n")
                sys.stderr.write(f"err {job}\n")
    assert heard == {"stdout": ["out 0\n", "out 1\n"], "stderr": ["err 0\n", "err 1\n"]}
    assert terminal.lines() == ["out 0", "err 0", "out 1", "err 1"]


def test_where_there_is_no_terminal_there_are_no_escape_codes(capsys):
    log = logging.getLogger("test_terminal")
    handler = edge.ConsoleLines(sys.stdout)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with edge._shown(), session("training", "test"):
            speak(log)
    finally:
        log.removeHandler(handler)
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "epoch 2" in out.splitlines()
    assert err.splitlines()[-1] == "warning: mind this"


def test_no_command_imports_what_takes_seconds_before_it_can_say_so():
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(f'ekd_lightning.cli.{name}')\n"
        "print({'torch', 'pytorch_lightning', 'wandb', 'optuna', 'matplotlib', 'plotly'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


COMMANDS = ("train", "teach", "data", "evaluate", "compare", "tune", "report", "export", "dashboard", "bench")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_the_packages_version(name, capsys, monkeypatch):
    from importlib import import_module
    from importlib.metadata import version

    main = import_module(f"ekd_lightning.cli.{name}").main
    monkeypatch.setattr(sys, "argv", [f"ekd-{name}", "--version"])
    with contextlib.suppress(SystemExit):
        main()
    assert capsys.readouterr().out == f"ekd-lightning {version('ekd-lightning')}\n"
