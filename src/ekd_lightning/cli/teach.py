"""`ekd-teach`: reads, downloads or trains the teachers of a pool, and tests them."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ekd_lightning.config.commands import print_next, search_path
from ekd_lightning.config.config import import_user_modules, register_schema, to_settings
from ekd_lightning.config.directory import JobOutput, remove_unused
from ekd_lightning.config.edge import one_line, run_program
from ekd_lightning.config.output import print_table
from ekd_lightning.config.overrides import check_typed, config_flags, key_of
from ekd_lightning.errors import UserError
from ekd_lightning.progress import importing, phase, session
from ekd_lightning.runs.directory import STATUS, RunDirectory
from ekd_lightning.runs.lock import DirectoryLock
from ekd_lightning.runs.writer import is_rank_zero

PROGRAM = "ekd-teach"


def main() -> None:
    """Entry point of `ekd-teach`."""
    register_schema()
    try:
        run_program(PROGRAM, _checked)
    finally:
        remove_unused()


def _checked() -> None:
    check_typed(sys.argv[1:])
    _hydra_main()


@hydra.main(version_base="1.3", config_path="pkg://ekd_lightning.conf", config_name="teach")
def _hydra_main(cfg: DictConfig) -> None:
    with one_line(PROGRAM):  # already here: Hydra would print a line of its own before ours
        output = JobOutput(cfg)
        lock = DirectoryLock(output.directory) if is_rank_zero() else nullcontext()
        with output.anchored(), lock:
            teach(cfg, output)


def teach(cfg: DictConfig, output: JobOutput) -> None:
    """Obtains the first `teachers.count` teachers of the pool and tests each.

    Reads the groups data and teachers, and `trainer.accelerator`; writes teachers.json into the job's directory.

    Raises:
        UserError: For a user's mistake, or a directory that holds a run, before anything is written.
    """
    settings = to_settings(cfg)
    settings.check()
    if settings.resume is not None:
        raise UserError(f"resume={settings.resume}: has no effect in ekd-teach, which keeps existing teachers anyway")
    import_user_modules(settings.imports)
    if is_rank_zero() and RunDirectory(output.directory).file(STATUS) is not None:
        raise UserError(f"hydra.run.dir={output.directory}: holds a run; give another directory")
    filled = settings.teachers.fill != "none"
    with session("data", "teachers", "test", *(["table"] if filled else [])):
        with phase("data"), importing("PyTorch and Lightning"):
            from ekd_lightning.pipeline.teachers import obtain_teachers  # noqa: PLC0415 (slow; --help needs none)

        rows = obtain_teachers(settings, output.directory, on_start=output.start)
    heads = ("teacher", "source", "parameters", "test accuracy %", "SHA-256")
    cells = (
        (
            row["id"],
            row["source"],
            f"{row['num_parameters']:,}",
            "" if row["test_accuracy"] is None else f"{100 * row['test_accuracy']:.2f}",
            row["sha256"][:12],
        )
        for row in rows
    )
    print_table(f"teachers for {settings.data.name}", heads, cells, left=("teacher", "source", "SHA-256"))
    words = [word for word in HydraConfig.get().overrides.task if key_of(word) != "teachers.fill"]
    print_next(f"ekd-train {shlex.join([*_flags(), *search_path(), *words])}")


def _flags() -> list[str]:
    """`--config-dir` and the like as given here, without `--config-name teach`, which ekd-train cannot use."""
    kept: list[str] = []
    words = iter(config_flags(sys.argv))
    for word in words:
        pair = [word] if "=" in word else [word, next(words)]
        name, _, value = "=".join(pair).partition("=")
        kept += [] if name in ("--config-name", "-cn") and value == "teach" else pair
    return kept


if __name__ == "__main__":
    main()
