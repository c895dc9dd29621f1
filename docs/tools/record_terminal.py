"""Records what a person sees of a run: on a terminal, halfway and at its end, and in a pipe.

    python docs/tools/record_terminal.py docs/figures

writes terminal_run.svg, terminal_end.svg and terminal_pipe.svg from real runs of a few minutes on the bundled digits.
Needs pyte, which the extra `dev` has.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

COLUMNS, ROWS = 118, 34
WORDS = ("experiment=quick", "recipe.epochs=5", "teachers.recipe.epochs=3", "hydra.run.dir=outputs/digits/first")
HALFWAY = re.compile(r"epoch 4/5")


def screen_text(screen: pyte.Screen) -> Text:
    """What a screen shows, with its colours, without empty rows at the end."""
    text = Text()
    for row in range(screen.lines):
        cells = [screen.buffer[row][column] for column in range(screen.columns)]
        for style, same in groupby(cells, style_of):
            text.append("".join(cell.data for cell in same), style)
        text.append("\n")
    text.rstrip()
    return text


def style_of(cell: pyte.screens.Char) -> str:
    """Its style in the words of rich."""
    colour = f"#{cell.fg}" if re.fullmatch("[0-9a-f]{6}", cell.fg) else {"brown": "yellow"}.get(cell.fg, cell.fg)
    return f"{'bold ' if cell.bold else ''}{colour}"


def write_svg(text: Text, path: Path, title: str) -> None:
    """Draws a terminal's text as a picture."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(text, soft_wrap=True)
    console.save_svg(str(path), title=title)


def on_a_terminal(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[Text, Text]:
    """Runs a command in a pseudo-terminal; the screen halfway, and at the end."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream, halfway = pyte.ByteStream(screen), Text()
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execvpe(command[0], command, environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    while True:
        try:
            content = os.read(terminal, 1 << 16)
        except OSError:  # the other side is closed
            break
        if not content:
            break
        stream.feed(content)
        if not halfway and HALFWAY.search("\n".join(screen.display)):
            halfway = screen_text(screen)
    os.waitpid(process, 0)
    return halfway, screen_text(screen)


def main() -> None:
    """Runs twice, with one store, and leaves the pictures."""
    out = Path(sys.argv[1])
    programs = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "TERM": "xterm-256color"}
    command = ["ekd-train", *WORDS]
    title = " ".join(command)
    with tempfile.TemporaryDirectory() as folder:
        halfway, end = on_a_terminal(command, Path(folder), environment)
        write_svg(halfway, out / "terminal_run.svg", title)
        write_svg(end, out / "terminal_end.svg", title)
        again = subprocess.run(
            [*command, "overwrite=true"],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True,
        )  # fmt: skip
        write_svg(Text(again.stdout), out / "terminal_pipe.svg", f"{title} | cat")


if __name__ == "__main__":
    main()
