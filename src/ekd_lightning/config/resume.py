"""`resume=<run directory>`: compose what the run was started with, in its own directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ekd_lightning.config.config import changed_keys, read_config
from ekd_lightning.config.overrides import config_flags
from ekd_lightning.errors import UserError
from ekd_lightning.runs.directory import CONFIG, OVERRIDES, RunDirectory
from ekd_lightning.settings import may_change_between_parts

SWEEP_FILE = "sweep.json"
"""The plan of a sweep, in its folder."""


def resume_word(argv: Sequence[str]) -> Path | None:
    """The folder that `resume=` names on a command line; the last one counts, `resume=null` is none."""
    given = [word for word in argv[1:] if word.startswith("resume=")]
    if not given or given[-1] in ("resume=null", "resume="):
        return None
    return Path(given[-1].removeprefix("resume=").strip("'\"")).absolute()


def named_sweep(argv: Sequence[str]) -> Path | None:
    """The folder that `resume=` names, if it is that of a whole sweep.

    Raises:
        UserError: For a sweep that was not planned ahead.
    """
    folder = resume_word(argv)
    if folder is None or RunDirectory(folder).file(CONFIG) is not None:
        return None
    if (folder / SWEEP_FILE).is_file():
        return folder
    if (folder / "multirun.yaml").is_file():
        raise UserError(
            f"resume={folder}: a sweep without a plan ({SWEEP_FILE}), as other sweepers than Hydra's own leave it; "
            "its runs can be continued one by one"
        )
    return None


def expand_resume(argv: list[str]) -> list[str]:
    """Replaces `resume=DIR` by the overrides that the run in DIR was started with, and its directory.

    Overrides given beside `resume` come last, so they win.

    Args:
        argv: Program name and command line.

    Returns:
        The command line to run; `argv` itself without `resume=`.

    Raises:
        UserError: If DIR is not a stopped run.
    """
    directory = resume_word(argv)
    if directory is None:
        return argv
    given = [word for word in argv[1:] if word.startswith("resume=")]
    recorded = read_config(directory)
    if _is_complete(directory, recorded):
        raise UserError(f"resume={directory}: this run is done, there is nothing to continue")
    if "-m" in argv or "--multirun" in argv:
        raise UserError("resume: continues one run; it cannot be combined with --multirun")
    first = _recorded_overrides(directory)
    flags = config_flags(argv)  # before all overrides: argparse takes no positionals on both sides of a flag
    extra = [word for word in argv[1:] if word not in (*given, *first, *flags)]
    own = [
        f"resume='{directory}'",
        f"hydra.run.dir='{directory}'",
        "hydra.output_subdir=null",
        "hydra.mode=RUN",
    ]
    return [argv[0], *flags, *first, *[word for word in extra if not word.startswith(_HYDRA_OWN)], *own]


_HYDRA_OWN = ("hydra.run.dir=", "hydra.output_subdir=", "hydra.mode=")


def check_unchanged(directory: Path, plain: dict[str, Any]) -> None:
    """Refuses a resume under a configuration that would compute something else.

    Raises:
        UserError: Naming the keys that differ from the recorded configuration.
    """
    changed = [
        key for key in changed_keys(read_config(directory), plain) if not may_change_between_parts(key)
    ]
    if changed:
        raise UserError(
            f"resume={directory}: {', '.join(changed[:5])} differ from the recorded run; "
            "a resumed run must compute what it was started with"
        )


def _is_complete(directory: Path, recorded: dict[str, Any]) -> bool:
    """Whether a run went through all epochs of its recipe.

    A run that trainer.max_epochs, max_time or a callback ended earlier has a result, and can go on.
    """
    result = RunDirectory(directory).record().result
    return result is not None and (result.epochs_done or 0) >= recorded["recipe"]["epochs"]


def _recorded_overrides(directory: Path) -> list[str]:
    run = RunDirectory(directory)
    if run.file(OVERRIDES) is None:
        raise UserError(f"resume={directory}: it has no {OVERRIDES}, so its start is not known")
    return run.overrides()
