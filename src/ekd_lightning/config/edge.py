"""Edge of the commands: parsers, exit codes and log lines; a user's mistake becomes one line, no traceback."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from ekd_lightning.config.mistakes import line_of
from ekd_lightning.errors import STARTED_IN, UserError, unknown_name
from ekd_lightning.progress import Reporter, Session, reported_by
from ekd_lightning.progress_lines import Lines
from ekd_lightning.roles import check_value
from ekd_lightning.runs.writer import is_rank_zero

OFF_SCREEN = {"off_screen": True}
"""`extra` of a log line that goes to the log file only, because the screen shows its content in another way."""
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143  # of shells, for a program that Ctrl-C or SIGTERM has ended

_LEVELS = {
    "ekd_lightning.progress_lines": logging.INFO,  # even in commands that log warnings only
    "pytorch_lightning.utilities.rank_zero": logging.WARNING,
    "lightning.pytorch.utilities.rank_zero": logging.WARNING,
    "hydra_plugins": logging.WARNING,  # the sweep's own lines name its jobs
    "hydra._internal.core_plugins": logging.WARNING,
    # PyTorch logs at exit, if Ctrl-C came before it had set its own levels.
    "torch._subclasses.fake_tensor": logging.WARNING,
    "torch.utils.cpp_extension": logging.ERROR,  # CUDA may be missing
}


class _HubRetries(logging.Filter):
    """Tells once that a request to the Hugging Face hub has failed, in place of four lines for each try."""

    _told = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line of the hub's client is about something else."""
        cause, sign, _ = record.getMessage().partition(" thrown while requesting ")
        log = logging.getLogger(__name__)
        if sign and not self._told and log.isEnabledFor(logging.WARNING):  # not within a check of settings
            self._told = True
            log.warning("a request to the Hugging Face hub failed (%s); trying again", cause)
        return not (self._told and (sign or cause.startswith(("Retrying in ", "Rate limited. Waiting "))))


_HUB_RETRIES = _HubRetries()


def quiet_libraries() -> None:
    """Silences messages of libraries that are untrue here or repeat in every run."""
    logging.getLogger("huggingface_hub.utils._http").addFilter(_HUB_RETRIES)
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for message in (
        ".*does not have many workers.*",  # there are none: images are in memory
        ".*module.* in eval mode.*",  # the teachers, on purpose
        ".*isinstance.treespec, LeafSpec.*",
        ".*Total length of .* across ranks is zero.*",  # a teacher has no validation images
        ".*is smaller than the logging interval.*",  # curves are per epoch
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
        "Grad strides do not match bucket view strides.*",  # of 1 x 1 convolutions in channels_last, told by each rank
        ".*srun. command is available.*",  # most runs need none; the number of processes is checked
    ):
        warnings.filterwarnings("ignore", message)


def make_parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The parser of a program, with examples at the end of `--help`."""
    parser = argparse.ArgumentParser(
        prog=program, description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=package_version())
    return parser


def package_version() -> str:
    """The line that `--version` of every command prints."""
    return f"ekd-lightning {version('ekd-lightning')}"


def run_command(
    parser: argparse.ArgumentParser,
    body: Callable[[argparse.Namespace], object],
    argv: Sequence[str] | None = None,
    *,
    level: int | None = logging.INFO,
) -> None:
    """Runs `body` with the arguments; a user's mistake exits as in `one_line`, a return value of False with code 1.

    Arguments of None are those of the process. A level of None leaves logging unchanged.
    """
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_intermixed_args(words)
    if level is not None:
        logging.basicConfig(level=level, handlers=[ConsoleLines(sys.stderr)])
    with one_line(parser.prog), terminated_as_interrupted(), _started_here(), _shown(), _users_files_first(words):
        complete = body(args)
    if complete is False:
        sys.exit(1)


def check_options(args: argparse.Namespace, **allowed: Mapping[str, Any]) -> None:
    """Refuses values of options outside their ranges, metadata by the option's name (`rounds=COUNT`); None passes."""
    for name, metadata in allowed.items():
        check_value(f"--{name.replace('_', '-')}", getattr(args, name), metadata)


def parse_names(option: str, text: str, allowed: Collection[str]) -> list[str]:
    """Reads names separated by commas, each once; refuses unknown names, and no name at all, by a `UserError`."""
    names = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for name in names:
        if name not in allowed:
            raise unknown_name(option, name, allowed)
    if not names:
        raise UserError(f"{option} {text!r}: name at least one of {', '.join(allowed)}")
    return names


def run_program(program: str, body: Callable[[], object]) -> None:
    """Runs `body`; mistakes and interrupts end as in `one_line`.

    Other exceptions are bugs and keep their traceback.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands exceptions on, instead of printing its own report
    if "--version" in sys.argv[1:]:  # Hydra would print its own version
        print(package_version())
        return
    if "install=bash" in sys.argv[1:] and sys.stdout.isatty():  # a shell that evaluates the output needs no comment
        print(f"# completion for {program} in this shell (for every shell, add the line to ~/.bashrc):")
        print(f'#   eval "$({sys.argv[0]} -sc install=bash)"')
    if not {"--help", "-h"}.isdisjoint(sys.argv[1:]):
        from ekd_lightning.config import internals  # noqa: PLC0415 (a plain run needs none of it)

        internals.hide_from_help("study")  # declared studies, for ekd-compare --study
    with (
        one_line(program), terminated_as_interrupted(), _started_here(), _shown(), _users_files_first(sys.argv[1:])
    ):  # fmt: skip
        body()


def _users_files_first(words: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """Prefers configuration files in folders that a command line names to the package's files of the same names."""
    if not any(word.startswith(("--config-dir", "-cd")) or "hydra.searchpath" in word for word in words):
        return contextlib.nullcontext()
    from ekd_lightning.config import internals  # noqa: PLC0415 (a plain run needs none of it)

    return internals.users_files_first(words)


class ConsoleLines(logging.StreamHandler[Any]):
    """Log lines on the screen, without their source, which the log file has.

    Lines of a sweep's job begin with the name of its folder, as a rule its number. Of several processes of one job,
    only the first prints.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a line, on global rank 0."""
        if is_rank_zero() and not getattr(record, "off_screen", False):
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """The message, marked if it is a warning or an error."""
        kind = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        config: Any = HydraConfig.instance().cfg  # typed as a dataclass, but a DictConfig
        in_sweep = config is not None and config.hydra.mode is RunMode.MULTIRUN
        job = config.hydra.sweep.subdir if in_sweep and "num" in config.hydra.job else None
        return ("" if job is None else f"[{job}] ") + kind + logging.Formatter().format(record)


class OnScreen(Reporter):
    """Shows progress in one live display on a terminal, in plain lines elsewhere; only on global rank 0."""

    _shows = Reporter()

    def start(self, session: Session) -> None:
        """Chooses the display for a session and starts it."""
        terminal = next((stream for stream in (sys.stdout, sys.stderr) if stream.isatty()), None)
        if not is_rank_zero():
            self._shows = Reporter()
        elif session.live and terminal is not None and os.environ.get("TERM") != "dumb":
            from ekd_lightning.tracking.terminal import LiveDisplay  # noqa: PLC0415 (a pipe needs none)

            self._shows = LiveDisplay(terminal)
        else:
            self._shows = Lines()
        self._shows.start(session)

    def stop(self) -> None:
        """Stops the display."""
        self._shows.stop()
        self._shows = Reporter()


@contextlib.contextmanager
def _shown() -> Iterator[None]:
    """Shows progress within the block, and each warning as one line without its place in the code."""
    show, form = warnings.showwarning, warnings.formatwarning

    def show_in_one_line(*warning: Any) -> None:
        # Set for each warning, because Lightning replaces it when it is imported.
        warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
        show(*warning)

    warnings.showwarning = show_in_one_line  # type: ignore[assignment] # Python calls it with six, in order
    quiet_libraries()
    try:
        with reported_by(OnScreen()):
            yield
    finally:
        warnings.showwarning, warnings.formatwarning = show, form


@contextlib.contextmanager
def logged_as_by_commands() -> Iterator[None]:
    """Logs to standard error and quiets libraries within the block, for calls from the user's own program.

    A program that has set up logging decides itself where lines go.
    """
    own, lines = logging.getLogger("ekd_lightning"), ConsoleLines(sys.stderr)
    before = {name: logging.getLogger(name).level for name in (own.name, *_LEVELS)}
    try:
        with warnings.catch_warnings():
            quiet_libraries()
            if not own.hasHandlers():
                own.addHandler(lines)
                own.setLevel(logging.INFO)
            yield
    finally:
        own.removeHandler(lines)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def restored_environment(*names: str) -> Iterator[None]:
    """Gives environment variables, at the end of the block, the values that they had before it."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


@contextlib.contextmanager
def _started_here() -> Iterator[None]:
    if os.environ.get(STARTED_IN):  # by the process that started this one, or by another thread
        yield
        return
    os.environ[STARTED_IN] = os.getcwd()
    try:
        yield
    finally:
        os.environ.pop(STARTED_IN, None)


_ENDING = (signal.SIGTERM, signal.SIGUSR1)  # SLURM sends the second before the first, if --signal=USR1@60 asks for it


class _Termination:
    """Handler of `_ENDING` that interrupts this process as Ctrl-C does, once, and remembers that it has."""

    came = False

    def __init__(self) -> None:
        self._process = os.getpid()
        _Termination.came = False

    def __call__(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a fork, whose parent ends it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not _Termination.came:  # `timeout` sends it twice
            _Termination.came = True
            raise KeyboardInterrupt


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Lets SIGTERM and SIGUSR1 interrupt the block like Ctrl-C, so that children are stopped and files closed."""
    if threading.current_thread() is not threading.main_thread():  # only there a handler can be set
        yield
        return
    handler = _Termination()
    before = {number: signal.signal(number, handler) for number in _ENDING}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def one_line(program: str) -> Iterator[None]:
    """Turns a user's mistake or interrupt within the block into one line on stderr.

    A mistake exits with code 2, Ctrl-C with code 130, SIGTERM and SIGUSR1 with code 143.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if not is_interrupt(stop):
            raise
        what = str(stop) if isinstance(stop, KeyboardInterrupt) else ""
        if is_rank_zero():
            print(f"{program}: interrupted" + (f": {what}" if what else ""), file=sys.stderr)
        sys.exit(EXIT_TERMINATED if _Termination.came or _is_lightnings(stop) else EXIT_INTERRUPTED)
    except Exception as error:
        if (line := line_of(error)) is None:
            raise
        print(f"{program}: error: {' '.join(line.split())}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


@contextlib.contextmanager
def ending_callback(program: str) -> Iterator[None]:
    """Ends the program if one of Hydra's callbacks fails; Hydra itself would only warn and continue.

    A user's mistake exits as in `one_line`, any other exception with its traceback and code 1.
    """
    try:
        with one_line(program):
            yield
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def is_interrupt(error: BaseException) -> bool:
    """Whether an exception is an unreported Ctrl-C or SIGTERM, which Lightning turns into SystemExit."""
    if isinstance(error, SystemExit):
        told = error.code in (EXIT_INTERRUPTED, EXIT_TERMINATED)
        return (_is_lightnings(error) or isinstance(error.__context__, KeyboardInterrupt)) and not told
    return isinstance(error, KeyboardInterrupt)


def _is_lightnings(error: BaseException) -> bool:
    """Whether it is what Lightning raises after SIGTERM in a job that a launcher started; its own exit code is 0."""
    return type(error).__name__ == "SIGTERMException"
