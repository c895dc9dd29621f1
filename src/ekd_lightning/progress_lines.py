"""Progress in plain lines, for pipes and CI."""

from __future__ import annotations

import contextlib
import logging
import threading
import time

from ekd_lightning.progress import Reporter, Session, Task, readable

log = logging.getLogger(__name__)

HEARTBEAT = {"heartbeat": True}
"""`extra` of a log line that only states the progress; log files leave it out."""
_FIRST_SECONDS, _QUIET_SECONDS, _MOST_SECONDS, _POLL_SECONDS = 3.0, 15.0, 300.0, 0.5


class Lines(Reporter):
    """Logs the progress whenever nothing else has been logged for a while."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._reported: tuple[str, str | None] | None = None
        self._words, self._pause = "", _QUIET_SECONDS
        self._last_line = _LastLine()

    def start(self, session: Session) -> None:
        """Starts the thread."""
        self._stop.clear()
        self._last_line.time = time.monotonic()
        if logging.getLogger().handlers:  # being the only one, it would silence Python's last resort for warnings
            logging.getLogger().addHandler(self._last_line)
        self._thread = threading.Thread(target=self._watch, args=(session,), name="progress", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread."""
        self._stop.set()
        self._thread.join()
        logging.getLogger().removeHandler(self._last_line)

    def _watch(self, session: Session) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            with contextlib.suppress(Exception):  # the session changes meanwhile: the next attempt may succeed
                self.report(session)

    def report(self, session: Session) -> None:
        """Logs the progress if a line is due; less and less often while nothing changes."""
        task = session.at_work
        if task is None:
            return
        part, words = task.part, task.words()
        line = status_line(task, session)  # also where it is not due, as the pace is learnt from it
        names = (task.name, part.name if part else None)
        if changed := names != self._reported or words != self._words:
            self._pause = _QUIET_SECONDS
        pause = self._pause if names == self._reported else _FIRST_SECONDS
        if time.monotonic() - self._last_line.time < pause:
            return
        self._pause = _QUIET_SECONDS if changed else min(2 * self._pause, _MOST_SECONDS)
        self._reported, self._words, self._last_line.time = names, words, time.monotonic()
        log.info("%s", line, extra=HEARTBEAT)


class _LastLine(logging.Handler):
    """Remembers the time of the last log line."""

    time = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        self.time = time.monotonic()


def status_line(task: Task, session: Session) -> str:
    """Returns the state and time of a phase in one line."""
    state = " ".join(f"{task.name}: {task.words()}".split("\n")).rstrip(": ")
    left = session.seconds_left
    if left is None and session.whole is None:
        left = task.seconds_left
    more = f"about {readable(left)} left" if left is not None else f"{readable(task.elapsed)} so far"
    return f"{state} ({more})"
