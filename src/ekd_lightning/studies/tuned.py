"""What `ekd-tune` leaves and prints: `<method>.yaml` and the table of the best trials."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.table import Table

from ekd_lightning.errors import UserError
from ekd_lightning.files import write_text

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from ekd_lightning.studies.trials import TuningStudy

log = logging.getLogger(__name__)

_SHOWN_TRIALS = 10
_WIDTH = 120  # where there is no terminal


def read_overrides(path: Path) -> list[str]:
    """Overrides of a result of `ekd-tune`, for the command line.

    Raises:
        UserError: If the file is not such a result.
    """
    try:
        content = yaml.safe_load(path.read_text())
        return [str(word) for word in content["overrides"]]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        raise UserError(f"{path}: not a result of ekd-tune") from None


_SAME = ("data", "fraction", "subset_sha256", "epochs")


def warn_of_other_budgets(output: Path, facts: dict[str, Any]) -> None:
    """Results in one folder are meant to be compared."""
    for path in sorted(output.glob("*.yaml")):
        if path.stem == facts["method"]:
            continue
        try:
            other = yaml.safe_load(path.read_text())
            differ = [name for name in ("budget", "seeds") if other[name] != facts[name]]
            differ += [name for name in _SAME if other["protocol"][name] != facts["protocol"][name]]
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
            continue
        if differ:
            log.warning("%s was tuned with other %s: a comparison would not be fair", path, ", ".join(differ))


def write_outcome(output: Path, study: TuningStudy, facts: dict[str, Any]) -> None:
    """Writes `<method>.yaml` as soon as a trial is complete, and anew after each."""
    from ekd_lightning.studies.tuning import outcome, standard_error  # noqa: PLC0415 (needs Optuna)

    found = outcome(study)
    if found is None:
        return
    content = {
        "method": facts["method"],
        "overrides": found.overrides,
        "value": found.value,
        "default_value": found.default_value,
        "by_seed": found.by_seed,
        "standard_error": standard_error(found.value, facts["validation_images"]),
        "trials": found.trials,
        "pruned": found.pruned,
        "diverged": found.diverged,
        **{name: value for name, value in facts.items() if name != "method"},
    }
    write_text(output / f"{facts['method']}.yaml", yaml.safe_dump(content, sort_keys=False, width=_WIDTH))


def show_outcome(output: Path, study: TuningStudy, facts: dict[str, Any]) -> None:
    """Prints the best trials, and what their difference means."""
    from ekd_lightning.studies.tuning import outcome, ranking, standard_error  # noqa: PLC0415 (needs Optuna)

    found = outcome(study)
    if found is None:
        ended = sum(trial.state.is_finished() for trial in study.trials)
        raise UserError(f"{output}: no trial is complete ({ended} ended early); nothing to choose from")
    _print_table(f"{facts['method']}: the best of {found.trials} trials", ranking(study)[:_SHOWN_TRIALS])
    images = facts["validation_images"]
    error = 100 * standard_error(found.value, images)
    if found.default_value is None:
        gain = "the default did not come to an end"
    else:
        default = 100 * found.default_value
        gain = f"{100 * found.value - default:+.2f} points over the default's {default:.2f} %"
    print(
        f"best {100 * found.value:.2f} %, {gain}; with {images} validation images the standard error of an "
        f"accuracy is about {error:.2f} points, sqrt(p(1-p)/n).  {found.pruned} pruned, {found.diverged} diverged"
        f"  -> {output / facts['method']}.yaml"
    )


def _print_table(title: str, trials: Sequence[FrozenTrial]) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("trial", "validation %", "settings"):
        table.add_column(name, justify="left" if name == "settings" else "right")
    for trial in trials:
        words = "  ".join(trial.user_attrs["overrides"]) or "as given (the default)"
        table.add_row(str(trial.number), f"{100 * float(trial.value or 0):.2f}", words)
    console = Console(file=sys.stdout)
    Console(file=sys.stdout, width=max(console.width, _WIDTH)).print(table)
