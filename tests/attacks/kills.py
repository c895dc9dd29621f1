"""Kill -9 of a command at a chosen instant: before the n-th change that it makes to files, or before a step."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from scenes import call

_CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.link", "shutil.rmtree", "shutil.move")
MOST_SECONDS = 900


class _Counter:
    """Counts what a process does to files below a folder, and kills it at one of these acts."""

    def __init__(self, folder: Path, at: int | None) -> None:
        self.folder, self.at, self.count = str(folder), at, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in _CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & 0o3)
        if changes and any(str(one).startswith(self.folder) for one in arguments if isinstance(one, (str, Path))):
            self.act()

    def act(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def _count_rows(counter: _Counter) -> None:
    """Rows of teacher tables are written past Python's ears; each counts, half of it written where it is the last."""
    pwrite = os.pwrite

    def counted(file: int, content: Any, offset: int) -> int:
        if counter.count + 1 == counter.at:
            pwrite(file, bytes(content)[: len(content) // 2], offset)
        counter.act()
        return pwrite(file, content, offset)

    os.pwrite = counted


def acts_of(program: str, *words: object, folder: Path, at: int | None = None) -> int:
    """Runs a command in a child process that is killed before one of its acts.

    Acts are files opened for writing, renamed or removed, and folders made or removed, all below `folder`, and rows
    written to a table.

    Args:
        program: The command.
        words: Its arguments.
        folder: Where it is at work; also the working directory.
        at: The act, from 1; None lets it end.

    Returns:
        How many acts there were, when it came to its end; 0 if it was killed.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        counter = _Counter(folder, at)
        try:
            os.close(read)
            signal.alarm(MOST_SECONDS)
            sys.addaudithook(counter)
            _count_rows(counter)
            called = call(program, *words, cwd=folder)
            os.write(write, f"{called.code} {counter.count} {called.err[-3000:]}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"ended by signal {os.WTERMSIG(status)}"
        return 0
    code, count, err = said.split(" ", 2)
    assert code == "0", err
    return int(count)
