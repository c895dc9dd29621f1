"""A small world of runs, studies, sweeps, teachers and exports, and the commands that read it."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from whole_runs import TINY

from ekd_lightning.errors import UserError

LONGEST_SECONDS = 600
"""Of a command, where it waits for what never comes; on a busy machine a training takes minutes."""
MEMORY = 6 << 30
"""Bytes that a command may ask for beyond what this process has: what reads /dev/zero to its end asks for more."""
VOLATILE = ("seconds", "per_second", "latency", "throughput", "memory", "written", "hit_rate", "started", "time")
FILES = ("train_seconds", "images_per_second")
WHOLE = ("trainer.max_epochs=2",)
"""What lets a run of `few` that was stopped after its first epoch go on to its end."""
RUNS = ("study/runs/kd_mean-f0.1-s0", "study/runs/kd_mean-f0.1-s1")


@dataclass
class World:
    """Where everything lies; a scene is a folder of it, made when first needed and put back before each attack."""

    root: Path
    kept: Path

    def restore(self, scene: str) -> None:
        if not (self.kept / scene).exists():
            self.root.mkdir(exist_ok=True)
            SCENES[scene](self.root)
            self._copy(self.root, self.kept, scene)
        for path in (self.root / "out", self.root / scene):
            shutil.rmtree(path, ignore_errors=True)
        self._copy(self.kept, self.root, scene)

    @staticmethod
    def _copy(source: Path, target: Path, scene: str) -> None:
        target.mkdir(exist_ok=True)
        subprocess.run(["cp", "-a", source / scene, target / scene], check=True)  # tables stay sparse


@dataclass
class Called:
    """What a command said and how it ended; `error` is what became a traceback."""

    code: int
    out: str
    err: str
    error: BaseException | None = None

    @property
    def complaints(self) -> str:
        """Standard error, and the lines of standard output by which a sweep tells of jobs that failed."""
        return "\n".join([self.err, *(line for line in self.out.splitlines() if re.search("error: |failed: ", line))])


class _TooLongError(BaseException):
    pass


def _too_long(*_: object) -> None:
    raise _TooLongError(f"longer than {LONGEST_SECONDS} s")


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """A command that reads what has no end, or waits for what never comes, fails instead."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    handler = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _load() -> None:
    """What a program does that uses an exported student."""
    import torch

    from ekd_lightning import load
    from ekd_lightning.config.edge import one_line

    with one_line("load"):
        print(load(sys.argv[1])(torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)).tolist())


def call(program: str, *words: object, cwd: Path) -> Called:
    """Calls a command as the console script would, with its log on standard error."""
    main: Callable[[], None] = _load
    if program != "load":
        main = importlib.import_module(f"ekd_lightning.cli.{program.removeprefix('ekd-')}").main
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    out, err = io.StringIO(), io.StringIO()
    code, failure = 0, None
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: print(message, file=err)
        patch.setattr(sys, "argv", [program, *map(str, words)])
        patch.chdir(cwd)
        before = dict(os.environ)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limited():
            root.handlers = [logging.StreamHandler(err)]
            root.setLevel(logging.INFO)
            try:
                main()
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException as error:
                traceback.print_exc()
                code, failure = 1, error
    root.handlers, root.level = handlers, level
    os.environ.clear()
    os.environ.update(before)
    return Called(code, out.getvalue(), err.getvalue(), failure)


# -- what commands leave behind, without what differs from one run to the next ------------------------------------


def steady(value: Any) -> Any:
    """A record without times, memory and the like."""
    if isinstance(value, dict):
        return {key: steady(item) for key, item in value.items() if not any(word in str(key) for word in VOLATILE)}
    return [steady(item) for item in value] if isinstance(value, list) else value


def _result(directory: Path) -> Any:
    from ekd_lightning.runs.directory import RunDirectory

    return steady(dict(RunDirectory(directory).finished_result()))


def trained(directory: Path) -> Any:
    from ekd_lightning.networks import load_student, state_sha256

    return state_sha256(load_student(directory / "student.safetensors")), _result(directory)


def _trained_or_refused(directory: Path) -> Any:
    try:
        return trained(directory)
    except UserError:
        return None


def _reported(folder: Path) -> Any:
    with (folder / "runs.csv").open(newline="") as stream:
        rows = {row["run"]: steady(row) for row in csv.DictReader(stream)}
    summary = json.loads((folder / "summary.json").read_text())
    page = (folder / "index.html").read_text() if (folder / "index.html").exists() else ""
    data = page.partition('id="data"')[2].partition("</script>")[0]
    return rows, steady(summary["blocks"]), data


def _exported(folder: Path) -> Any:
    import torch

    from ekd_lightning import load

    record = steady(json.loads((folder / "export.json").read_text()))
    for facts in record["files"].values():
        for name in ("sha256", "bytes"):  # of a file that names its time
            facts.pop(name)
    logits = load(folder / "student.safetensors")(torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32))
    for name in ("card_sha256", "ekd_sha256"):
        record.pop(name, None)
    return record, logits.tolist()


def compared(folder: Path) -> Any:
    return steady(json.loads((folder / "comparison.json").read_text()))


def tuned(folder: Path) -> Any:
    return steady(yaml.safe_load((folder / "kd_mean.yaml").read_text()))


# -- commands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command, what it leaves, and whether it may go on without a file that it names."""

    program: str
    words: Callable[[Path], tuple[object, ...]]
    left: Callable[[Path, Called], Any]
    leaves_out: bool = False
    trains: bool = False
    others: Callable[[Any], Any] = field(default=lambda left: None)
    """What of it has nothing to do with the damaged file."""


def _others(left: Any) -> Any:
    rows, _, _ = left
    return {name: row for name, row in rows.items() if name != Path(RUNS[0]).name}


def few(world: Path) -> tuple[str, ...]:
    return (*TINY, f"teachers.store={world}/store", "recipe.epochs=2", "data.val_fraction=0.3")


COMMANDS: dict[str, Command] = {
    "report": Command(
        "ekd-report",
        lambda w: (w / "study" / "runs", "-o", w / "out", "--no-figures", "--force"),
        lambda w, called: _reported(w / "out"),
        leaves_out=True,
        others=_others,
    ),
    "evaluate": Command(
        "ekd-evaluate",
        lambda w: (w / RUNS[0], "--force", "--parts", "generalisation,predictions"),
        lambda w, called: _result(w / RUNS[0]),
    ),
    "export": Command("ekd-export", lambda w: (w / RUNS[0], "-o", w / "out"), lambda w, called: _exported(w / "out")),
    "export best": Command(
        "ekd-export",
        lambda w: (w / RUNS[0], "-o", w / "out", "--weights", "best"),
        lambda w, called: _exported(w / "out"),
    ),
    "export again": Command(
        "ekd-export", lambda w: (w / RUNS[0], "--force"), lambda w, called: _exported(w / RUNS[0] / "export")
    ),
    "compare, the table": Command(
        "ekd-compare",
        lambda w: ("--output", w / "study", "--report-only"),
        lambda w, called: compared(w / "study"),
        leaves_out=True,
    ),
    "compare": Command(
        "ekd-compare", lambda w: ("--output", w / "study"), lambda w, called: compared(w / "study"), leaves_out=True
    ),
    "resume": Command(
        "ekd-train",
        lambda w: (f"resume={w}/stopped/a", *WHOLE),
        lambda w, called: trained(w / "stopped/a"),
        trains=True,
    ),
    "resume the sweep": Command(
        "ekd-train",
        lambda w: (f"resume={w}/sweep", *WHOLE),
        lambda w, called: {name: _trained_or_refused(w / "sweep" / name) for name in ("0", "1", "2")},
        leaves_out=True,
        trains=True,
        others=lambda left: left["2"],  # whose files are left as they are
    ),
    "train": Command(
        "ekd-train",
        lambda w: (*few(w), "method=kd_mean", f"hydra.run.dir={w}/out"),
        lambda w, called: trained(w / "out"),
        trains=True,
    ),
    "tune": Command(
        "ekd-tune",
        lambda w: ("--output", w / "tuned", "--trials", 2, *few(w), "method=kd_mean"),
        lambda w, called: tuned(w / "tuned"),
        trains=True,
    ),
    "tuned rows": Command(
        "ekd-compare",
        lambda w: (
            *("--output", w / "out", "--methods", "kd_mean", "--no-controls", "--match", "none", "--seeds", 0),
            *("--tuned", w / "tuned", "--print-jobs", "--fractions", 0.1),
            *(word for word in few(w) if not str(word).startswith("data.fraction=")),
        ),
        lambda w, called: called.out,
    ),
    "load": Command("load", lambda w: (w / RUNS[0] / "export/student.safetensors",), lambda w, called: called.out),
    "print": Command("ekd-tune", lambda w: ("--print", w / "tuned/kd_mean.yaml"), lambda w, called: called.out),
}


def _did(w: Path, program: str, *words: object) -> None:
    called = call(program, *words, cwd=w)
    assert called.code == 0, called.err


def _study(w: Path) -> None:
    """Two runs, one of them exported."""
    rows = ("--methods", "kd_mean", "--no-controls", "--match", "none", "--fractions", 0.1, "--seeds", "0,1")
    evaluated = ("evaluation=standard", "evaluation.parts=[predictions,generalisation]")
    own = [word for word in few(w) if not word.startswith(("method=", "data.fraction", "evaluation"))]
    _did(w, "ekd-compare", "--output", w / "study", *rows, *own, *evaluated)
    _did(w, "ekd-export", w / RUNS[0])


def _stopped(w: Path) -> None:
    """Two runs that can go on."""
    for name, seed in (("a", 0), ("b", 1)):
        words = ("method=kd_mean", f"seed={seed}", "trainer.max_epochs=1", f"hydra.run.dir={w}/stopped/{name}")
        _did(w, "ekd-train", *few(w), *words)


def _stopped_sweep(w: Path) -> None:
    """Three jobs, of which the first was stopped after an epoch."""
    from ekd_lightning.runs.writer import RunWriter

    words = (*few(w), "method=branched_ce", "trainer.max_epochs=1,2,null", f"hydra.sweep.dir={w}/sweep")
    _did(w, "ekd-train", "-m", *words)
    (w / "sweep/0/result.json").unlink()
    RunWriter(w / "sweep/0").stop()


def _search(w: Path) -> None:
    """One trial."""
    _did(w, "ekd-tune", "--output", w / "tuned", "--trials", 1, *few(w), "method=kd_mean")


def _taught(w: Path) -> None:
    """A store with two teachers, what they say of the test images, and a table of each."""
    _did(w, "ekd-train", *few(w), "method=kd_mean", f"hydra.run.dir={w}/out")


SCENES: dict[str, Callable[[Path], None]] = {
    "store": _taught,
    "study": _study,
    "stopped": _stopped,
    "sweep": _stopped_sweep,
    "tuned": _search,
}
