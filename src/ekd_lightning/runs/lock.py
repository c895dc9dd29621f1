"""Lock of a directory: one process holds it while it works there; the system frees it when that process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from ekd_lightning.errors import UserError

log = logging.getLogger(__name__)

LOCK_FILE = ".run.lock"
_PATIENCE_SECONDS = 0.5  # `is_held` takes a free lock for an instant, which must refuse nobody
_LONGEST_COMMAND = 200
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_OPEN_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""Flags that open a lock file; a link in its place is not followed, and a pipe does not block."""
_open: set[int] = set()
"""File descriptors of all locks of this process. A forked child closes its copies, which would keep the locks held."""
_warned: set[int] = set()
"""Numbers of the devices without locks that a warning has named."""


class LockedError(UserError):
    """The directory is in use by another process, or by another run of this one."""


class Holder(NamedTuple):
    """Process that holds a lock, according to the lock file; `pid` is 0 if unknown."""

    pid: int = 0
    host: str = ""
    command: str = ""

    @classmethod
    def this(cls) -> Holder:
        """Describes this process."""
        words = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        return cls(os.getpid(), socket.gethostname(), words[:_LONGEST_COMMAND])

    @classmethod
    def read(cls, file: int) -> Holder:
        """Reads the holder from an open lock file."""
        try:
            content: Any = json.loads(os.pread(file, 4096, 0))
            return cls(int(content["pid"]), str(content["host"]), str(content["command"]))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return cls()

    def is_alive(self) -> bool:
        """Whether it is another running process of this machine."""
        if not self.pid or self.host != socket.gethostname() or self.pid == os.getpid():
            return False
        try:
            os.kill(self.pid, 0)
        except OSError as error:
            return isinstance(error, PermissionError)
        return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}: {self.command}" if self.pid else "another process"


class DirectoryLock:
    """The lock of a directory, as a context manager.

    It excludes other processes as well as other runs of this process. A missing directory is made, and removed again
    at the end if it is still empty. In a distributed job, only global rank 0 takes the lock.

    On a file system without locks it warns once, and detects only processes of the same machine.

    Args:
        directory: The directory.
        patience: Seconds to wait for a lock that somebody else holds.
    """

    def __init__(self, directory: Path, *, patience: float = _PATIENCE_SECONDS) -> None:
        self.directory = directory.absolute()  # the working directory may change
        self._patience = patience
        self._file: int | None = None
        self._owner = 0
        self._made: list[Path] = []

    def __enter__(self) -> DirectoryLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            LockedError: If somebody else holds it, naming the process; nothing has been written then.
            OSError: If the directory cannot be written.
        """
        ahead = _ahead.pop(os.path.realpath(self.directory), None)
        if ahead is not None and ahead._owner == os.getpid():
            self._file, self._owner, self._made = ahead._file, ahead._owner, ahead._made
            return
        until = time.monotonic() + self._patience
        while self._file is None:
            self._made += make_directory(self.directory)
            try:
                file = os.open(self.directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | _OPEN_FLAGS, 0o644)
            except FileNotFoundError:  # its last holder has removed the directory
                continue
            try:
                if self._try(file):
                    self._file, file = file, -1
                elif time.monotonic() > until:
                    raise LockedError(f"{self.directory}: in use by {Holder.read(file)}")
                else:
                    time.sleep(0.01)
            finally:
                if file >= 0:
                    os.close(file)
        _open.add(self._file)
        self._owner = os.getpid()
        content = json.dumps(Holder.this()._asdict()).encode()
        with contextlib.suppress(OSError):  # a full disk holds the lock, but not the name of its holder
            os.truncate(self._file, 0)
            os.pwrite(self._file, content, 0)

    def _try(self, file: int) -> bool:
        """Locks an open lock file if it is free and still the directory's own."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if Holder.read(file).is_alive():
                return False
            if (device := os.fstat(file).st_dev) not in _warned:
                log.warning("%s: its file system has no locks; make sure that no other run uses it", self.directory)
            _warned.add(device)
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.directory / LOCK_FILE))
        except FileNotFoundError:  # its last holder has removed it meanwhile
            return False

    def release(self) -> None:
        """Frees the lock; nothing happens if it is not held, or in a forked child of its holder."""
        if self._file is None or self._owner != os.getpid():
            return
        with contextlib.suppress(OSError):
            os.unlink(self.directory / LOCK_FILE)  # while it is held, so it is never the next holder's
        _open.discard(self._file)
        os.close(self._file)
        self._file = None
        remove_empty(self._made)


_ahead: dict[str, DirectoryLock] = {}
"""Locks that `lock_ahead` took, by the real path of the directory."""


def lock_ahead(directory: Path) -> None:
    """Takes the lock of a directory in advance, for the next `DirectoryLock` of it in this process.

    Raises:
        LockedError: If somebody else holds it.
        OSError: If the directory cannot be written.
    """
    lock = DirectoryLock(directory)
    lock.acquire()
    _ahead[os.path.realpath(directory)] = lock


def release_ahead() -> None:
    """Frees the locks of `lock_ahead` that no `DirectoryLock` has used."""
    while _ahead:
        _ahead.popitem()[1].release()


def is_held(directory: Path) -> bool:
    """Whether a process holds the lock of a directory, this one included."""
    return holder(directory) is not None


def holder(directory: Path) -> Holder | None:
    """Returns the process that holds the lock of a directory, this one included; None if none does."""
    try:
        file = os.open(directory / LOCK_FILE, os.O_RDONLY | _OPEN_FLAGS)
    except PermissionError:  # another user's lock file
        return Holder()
    except OSError:  # no file, or no lock file
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return Holder.read(file)
    except OSError:  # a file system without locks
        found = Holder.read(file)
        return found if found.is_alive() or found.pid == os.getpid() else None
    finally:
        os.close(file)


def make_directory(directory: Path) -> list[Path]:
    """Makes a directory and its parents.

    Returns:
        Those that were missing, outermost first; for `remove_empty`.

    Raises:
        OSError: If one cannot be made, or is a file.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    made: list[Path] = []
    for path in reversed(missing):
        try:
            path.mkdir()
            made.append(path)
        except FileExistsError:  # another process was faster
            continue
        except FileNotFoundError:  # the error of /proc
            raise PermissionError(errno.EPERM, "cannot make a directory here", str(path)) from None
    directory.mkdir(exist_ok=True)  # raises if a file is in its place
    return made


def check_directory(directory: Path) -> None:
    """Checks that a directory can be made, and removes it again if it was absent.

    Raises:
        OSError: As `make_directory`.
    """
    remove_empty(make_directory(directory))


def remove_empty(directories: list[Path]) -> None:
    """Removes nested directories, given outermost first, as long as they are empty."""
    with contextlib.suppress(OSError):
        for path in reversed(directories):
            path.rmdir()


def _close_in_child() -> None:
    while _open:
        with contextlib.suppress(OSError):
            os.close(_open.pop())


os.register_at_fork(after_in_child=_close_in_child)
