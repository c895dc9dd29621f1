"""Trials of one configuration on disk, shared by all processes that work on them, and what they find.

Trial number n of the budget is a pure function of the sampler's seed, n and the trials before it, so a study that
was stopped and resumed tries what the uninterrupted one would have tried.
"""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import yaml
from filelock import FileLock
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ekd_lightning.config.config import changed_keys
from ekd_lightning.config.edge import print_table
from ekd_lightning.config.overrides import Scalar, override
from ekd_lightning.data.order import hash_uniform_u64
from ekd_lightning.errors import UserError
from ekd_lightning.files import read_json, write_json, write_text
from ekd_lightning.runs.lock import DirectoryLock, is_held
from ekd_lightning.studies.space import SearchSpace, tidied
from ekd_lightning.studies.tuned import standard_error

DESCRIPTION = "search.json"
_EARLIER_DESCRIPTION = "study.json"  # of versions up to 0.1
JOURNAL = "trials.journal"
_TRIALS_STREAM = 11  # its own domain, apart from order, views, subsets and epochs
_PRUNE_AFTER = 5  # complete trials, of which a median means something
_SHOWN_TRIALS = 10
_WIDTH = 120  # where there is no terminal
_COUNTED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


class Search:
    """A search on disk, opened by one of possibly several processes.

    Args:
        folder: The study's own folder; made if needed.
        description: What determines the study besides its trials, as plain containers.
        space: What is searched.
        defaults: The configuration's own values of searched keys, as far as they lie in the space.
        seed: Of the sampler, >= 0.
        warmup_steps: Epochs of a trial in which it is never pruned; None prunes nothing.
        ignored: Which dotted keys of the description may differ.

    Raises:
        UserError: If the folder holds a study with another description, or a damaged one.
    """

    def __init__(
        self,
        folder: Path,
        description: dict[str, Any],
        space: SearchSpace,
        defaults: dict[str, Scalar],
        *,
        seed: int = 0,
        warmup_steps: int | None = None,
        ignored: Callable[[str], bool] = lambda key: False,
    ) -> None:
        self.folder, self.space, self.defaults, self.seed = folder, space, defaults, seed
        self.prunes = warmup_steps is not None
        folder.mkdir(parents=True, exist_ok=True)
        self._workers = folder / "workers"
        self._lock = FileLock(folder / "study.lock")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self._lock:
            _check_description(folder, description, ignored)
            self._study = _open(folder, warmup_steps)
        self._name = uuid.uuid4().hex
        # Held as long as this process lives, whatever ends it: a running trial without it has died.
        self._alive = DirectoryLock(self._workers / self._name)
        self._alive.acquire()

    def close(self) -> None:
        """Says that no trial of this process is running."""
        self._alive.release()

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials so far, those of other processes included."""
        return self._study.get_trials(deepcopy=False)

    def claim(self, budget: int) -> optuna.Trial | None:
        """Starts the next trial.

        Args:
            budget: Trials the study may have in all; complete, pruned and running ones count.

        Returns:
            The trial, its `overrides` among its user attributes; None when the budget is used up.
        """
        with self._lock:
            self._bury_dead()
            counted = [trial for trial in self.trials if trial.state in _COUNTED]
            if len(counted) >= budget:
                return None
            space = self.space
            if is_default := not any(trial.user_attrs.get("default") for trial in counted):
                space = {key: space[key] for key in self.defaults}  # also where the space does not contain all
                if not any(trial.state == TrialState.WAITING for trial in self.trials):
                    self._study.enqueue_trial(self.defaults, {"default": True})
            self._study.sampler = _sampler(self.seed, len(counted))
            trial = self._study.ask(dict(space))
            found = {} if is_default else tidied(space, trial.params)
            trial.set_user_attr("worker", self._name)
            trial.set_user_attr("overrides", [override(key, value) for key, value in found.items()])
        return trial

    def tell(self, trial: optuna.Trial, value: float | None, state: TrialState) -> None:
        """Records how a trial ended."""
        self._study.tell(trial, value, state=state)

    def trial_folder(self, number: int) -> Path:
        """Where a trial works; nothing of it is kept."""
        return self.folder / "trials" / str(number)

    def _bury_dead(self) -> None:
        """Takes running trials of processes that were killed out of the count."""
        for trial in self.trials:
            worker = trial.user_attrs.get("worker")
            if trial.state != TrialState.RUNNING or worker == self._name:
                continue
            if worker is None or not is_held(self._workers / worker):
                self._study.tell(trial.number, state=TrialState.FAIL)
                shutil.rmtree(self.trial_folder(trial.number), ignore_errors=True)
                shutil.rmtree(self._workers / str(worker), ignore_errors=True)


def _check_description(folder: Path, description: dict[str, Any], ignored: Callable[[str], bool]) -> None:
    """Leaves the description of a new search; refuses one that differs from what is there."""
    path = next((p for name in (DESCRIPTION, _EARLIER_DESCRIPTION) if (p := folder / name).is_file()), None)
    if path is None:
        if (folder / JOURNAL).exists():
            raise UserError(f"{folder}: holds trials but no {DESCRIPTION}; choose another --output")
        write_json(folder / DESCRIPTION, description)
        return
    here = json.loads(json.dumps(description))
    there = read_json(path)
    settings = changed_keys(there.pop("config", {}), here.pop("config", {}))
    changed = [key for key in (*(f"config.{key}" for key in settings), *changed_keys(there, here)) if not ignored(key)]
    if changed:
        raise UserError(
            f"{folder}: holds a search of another configuration ({', '.join(changed[:5])} differ); "
            "choose another --output, or repeat its settings"
        )


def _open(folder: Path, warmup_steps: int | None) -> optuna.Study:
    path = folder / JOURNAL
    pruner = (
        optuna.pruners.NopPruner()
        if warmup_steps is None
        else optuna.pruners.MedianPruner(n_startup_trials=_PRUNE_AFTER, n_warmup_steps=warmup_steps)
    )
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
        return optuna.create_study(
            storage=storage, study_name="tune", direction="maximize", pruner=pruner, load_if_exists=True
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a journal of trials, or damaged ({type(error).__name__})") from None


def _sampler(seed: int, position: int) -> TPESampler:
    """The sampler of trial `position` of the budget.

    A new one for each: a resumed study would otherwise repeat its first draws, and two processes each other's.
    """
    drawn = int(hash_uniform_u64(_TRIALS_STREAM, seed, position, np.zeros(1, dtype=np.int64))[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(seed=drawn % 2**32, multivariate=True, constant_liar=True)


@dataclass(frozen=True)
class Outcome:
    """What a study has found so far; accuracies are on the validation split, of the last epoch, in [0, 1].

    Attributes:
        overrides: Of the best trial; empty if that is the configuration as it was given. Of equals the earliest.
        value: Its accuracy, a mean over seeds.
        default_value: Accuracy of the configuration as it was given; None if it diverged.
        by_seed: Accuracies of the best trial.
        trials: How many were complete, pruned or diverged.
        pruned: How many were stopped early.
        diverged: How many had a loss that is not finite.
    """

    overrides: list[str]
    value: float
    default_value: float | None
    by_seed: list[float]
    trials: int
    pruned: int
    diverged: int


def outcome(study: Search) -> Outcome | None:
    """Sums a study up; None as long as no trial is complete."""
    ended = [t for t in study.trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    ranked = ranking(study)
    if not ranked:
        return None
    best = ranked[0]
    diverged = sum(bool(t.user_attrs.get("diverged")) for t in ended)
    return Outcome(
        list(best.user_attrs["overrides"]),
        value_of(best),
        next((t.value for t in ranked if t.user_attrs.get("default")), None),
        list(best.user_attrs["by_seed"]),
        trials=len(ended),
        pruned=len(ended) - len(ranked) - diverged,
        diverged=diverged,
    )


def ranking(study: Search) -> list[FrozenTrial]:
    """The complete trials, best first; of equals the earliest first."""
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (-value_of(trial), trial.number))


def value_of(trial: FrozenTrial) -> float:
    """The accuracy of a complete trial, in [0, 1]."""
    return float(trial.value or 0.0)


def write_outcome(output: Path, study: Search, facts: dict[str, Any]) -> None:
    """Writes `<method>.yaml` as soon as a trial is complete, and anew after each."""
    if (found := outcome(study)) is None:
        return
    error = standard_error(found.value, facts["validation_images"])
    content = {"method": facts["method"], **asdict(found), "standard_error": error, **facts}
    write_text(output / f"{facts['method']}.yaml", yaml.safe_dump(content, sort_keys=False, width=_WIDTH))


def show_outcome(output: Path, study: Search, facts: dict[str, Any]) -> None:
    """Prints the best trials, and what their difference means.

    Raises:
        UserError: If no trial is complete.
    """
    if (found := outcome(study)) is None:
        ended = sum(trial.state.is_finished() for trial in study.trials)
        raise UserError(f"{output}: no trial is complete ({ended} ended early); nothing to choose from")
    rows = (
        (
            str(trial.number),
            f"{100 * value_of(trial):.2f}",
            "  ".join(trial.user_attrs["overrides"]) or "as given (the default)",
        )
        for trial in ranking(study)[:_SHOWN_TRIALS]
    )
    title = f"{facts['method']}: the best of {found.trials} trials"
    print_table(title, ("trial", "validation %", "settings"), rows, left=("settings",), width=_WIDTH)
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
