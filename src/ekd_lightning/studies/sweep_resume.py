"""`resume=<folder of a sweep>`: run what is left of it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout
from hydra._internal.hydra import Hydra  # with which hydra.main sets itself up; there is no public name
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra

from ekd_lightning.errors import UserError
from ekd_lightning.settings import keys_where, may_change_between_parts
from ekd_lightning.studies.plan import is_under, key_of
from ekd_lightning.studies.study_runs import Job
from ekd_lightning.studies.sweep import as_typed, locked, tell
from ekd_lightning.studies.sweep_jobs import (
    JobState,
    Sweep,
    look,
    read_sweep,
    recorded_overrides,
    settled,
)

# Where the sweep is and that it is one is known; these are given anew.
_OWN = ("hydra.mode", "hydra.sweep", "hydra.run", "hydra.output_subdir", "hydra.job", "hydra.sweeper.params")
_LAUNCHER = ("hydra/launcher", "hydra.launcher")


def resume_sweep(folder: Path, argv: Sequence[str]) -> bool:
    """Runs what is left of a sweep, and prints its summary.

    Done runs are skipped, started ones go on from their last checkpoint (or start again without one), the others are
    started. Failed runs are tried again.

    Args:
        folder: Folder of the sweep, with sweep.json.
        argv: Program name and command line; beside `resume` it may hold overrides of Hydra, e.g. another launcher,
            and of what does not change the computation.

    Returns:
        Whether all runs are done.

    Raises:
        UserError: For words that would compute something else, or a sweep that is still running.
        KeyboardInterrupt: If the user interrupts, once everything has ended; says how it stands.
    """
    from ekd_lightning.studies.launching import launch  # noqa: PLC0415 (it imports this command)

    sweep = read_sweep(folder)
    assert sweep is not None
    hydra_words, extra = split_words(sweep, argv)
    with _alone(folder), _configured(sweep):
        states = settled(look(job, sweep.started) for job in sweep.jobs)
        jobs = [_job(state, extra) for state in states if state.state not in ("done", "partial")]
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        done, again = len(states) - len(jobs), sum(job.resumed for job in jobs)
        print(f"{as_typed(folder)}: {done} of {len(states)} runs are done; ", end="")
        print(f"{len(jobs)} to be run, {again} of them from their last checkpoint", flush=True)
        if jobs:
            launch(jobs, folder, hydra_words, sweep=sweep)
        tell(folder)
    return all(look(job, sweep.started).state in ("done", "partial") for job in sweep.jobs)


def split_words(sweep: Sweep, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of Hydra to launch with, and further ones for the runs.

    Raises:
        UserError: For an option, or an override that would change what is computed.
    """
    given = [word for word in argv[1:] if not word.startswith("resume=") and word not in ("-m", "--multirun")]
    hydra = [word for word in given if key_of(word).startswith(("hydra.", "hydra/"))]
    extra = [word for word in given if word not in hydra]
    for word in extra:
        if "=" not in word or not may_change_between_parts(key_of(word)):
            raise UserError(
                f"{word}: a resumed sweep computes what it was started with; beside resume= it takes a launcher "
                f"(hydra/launcher=..., hydra.launcher...) and {', '.join(keys_where(may_change_between_parts))}"
            )
    dropped = (*_OWN, *_LAUNCHER) if any(key_of(word) == "hydra/launcher" for word in hydra) else _OWN
    again = {key_of(word) for word in hydra}
    kept = [word for word in sweep.hydra if not is_under(key_of(word), dropped) and key_of(word) not in again]
    return [*kept, *(word for word in hydra if not is_under(key_of(word), _OWN))], extra


def _job(state: JobState, extra: Sequence[str]) -> Job:
    directory = state.job.directory
    recorded = recorded_overrides(directory)
    resumed = (
        bool(recorded) and (directory / "checkpoints" / "last.ckpt").is_file() and state.state != "waiting"
    )
    words = recorded if resumed else state.job.overrides
    return Job(
        directory, (*(w for w in words if not is_under(key_of(w), map(key_of, extra))), *extra), resumed
    )


@contextmanager
def _configured(sweep: Sweep) -> Iterator[None]:
    """Hydra as it was when the sweep was started, the user's own `--config-dir` included."""
    path = create_config_search_path("pkg://ekd_lightning.conf")
    if sweep.config_dir is not None:
        path.append(
            "command-line", sweep.config_dir if "://" in sweep.config_dir else f"file://{sweep.config_dir}"
        )
    Hydra.create_main_hydra2(task_name="train", config_search_path=path)
    try:
        yield
    finally:
        GlobalHydra.instance().clear()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except Timeout:
            raise UserError(f"resume={folder}: this sweep is running") from None
        yield
