"""Trials of a search on disk, shared by all its processes, and their results.

Trial n of the budget is a pure function of the sampler's seed, n and the trials before it. So a search that was stopped
and resumed tries the same settings as an uninterrupted one.
"""

from __future__ import annotations

import math
import shutil
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import yaml
from filelock import FileLock
from optuna.samplers import TPESampler
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.trial import FrozenTrial, TrialState

from ekd_lightning.config.commands import called, compare_command, print_next, typed
from ekd_lightning.config.output import print_table
from ekd_lightning.config.overrides import Scalar, key_of, override, shell_word
from ekd_lightning.data.order import hash_uniform_u64
from ekd_lightning.errors import UserError
from ekd_lightning.files import write_yaml
from ekd_lightning.runs.lock import DirectoryLock, is_held, make_directory
from ekd_lightning.studies.space import SearchSpace, rounded_values
from ekd_lightning.studies.storage import open_study

_TRIALS_STREAM = 11  # its own domain, apart from order, views, subsets and epochs
_SHOWN_TRIALS = 10
_COUNTED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


class Search:
    """A search, opened by this process and possibly by others.

    Its trials are kept in a journal in the folder, which must lie on a file system with locks; or in a database, which
    processes of several machines can share.

    Args:
        folder: The search's folder; created if necessary.
        description: Everything that determines the search besides its trials, as plain containers.
        space: The search space.
        defaults: The configuration's own values of the searched keys, without values outside the space.
        seed: Seed of the sampler, >= 0.
        warmup_steps: Epochs of a trial in which it is never pruned; None prunes nothing.
        storage: URL of a database for the trials, in Optuna's form; None keeps a journal in the folder.

    Raises:
        UserError: If the folder or the database holds a search with another description, or a damaged one; or if the
            database cannot be opened.
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
        storage: str | None = None,
    ) -> None:
        self.folder, self.space, self.defaults, self.seed = folder, space, defaults, seed
        self.prunes = warmup_steps is not None
        make_directory(folder)
        self._in_database = storage is not None
        self._workers = folder / "workers"
        self._lock = FileLock(folder / "study.lock")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self._lock:
            self._study = open_study(folder, description, warmup_steps=warmup_steps, url=storage)
        self._name = uuid.uuid4().hex
        # Held until this process ends, in whatever way; a running trial whose lock is free has died.
        self._alive = DirectoryLock(self._workers / self._name)
        self._alive.acquire()

    def close(self) -> None:
        """Marks that no trial of this process is running."""
        self._alive.release()

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials so far, including those of other processes."""
        return self._study.get_trials(deepcopy=False)

    def claim(self, budget: int) -> optuna.Trial | None:
        """Starts the next trial.

        Args:
            budget: Trials the study may have in all; complete, pruned and running ones count.

        Returns:
            The trial, its `overrides` among its user attributes; None when the budget is used up.
        """
        with self._lock:
            while True:
                self._fail_dead_trials()
                counted = [trial for trial in self.trials if trial.state in _COUNTED]
                if len(counted) >= budget:
                    return None
                trial = self._ask(counted)
                earlier = [t for t in self.trials if t.state in _COUNTED and t.number < trial.number]
                again = trial.user_attrs.get("default") and any(t.user_attrs.get("default") for t in earlier)
                if len(earlier) < budget and not again:
                    return trial
                self.tell(trial, None, TrialState.FAIL)  # another machine, which this lock does not bind, was faster

    def _ask(self, counted: list[FrozenTrial]) -> optuna.Trial:
        space = self.space
        if is_default := not any(trial.user_attrs.get("default") for trial in counted):
            space = {key: space[key] for key in self.defaults}  # defaults may lie outside the space
            if not any(trial.state == TrialState.WAITING for trial in self.trials):
                self._study.enqueue_trial(self.defaults, {"default": True})
        self._study.sampler = _sampler(self.seed, len(counted))
        trial = self._study.ask(dict(space))
        with self.heartbeat(trial):  # the first one at once, in case this process dies early
            pass
        found = {} if is_default else rounded_values(space, trial.params)
        trial.set_user_attr("worker", self._name)
        trial.set_user_attr("overrides", [override(key, value) for key, value in found.items()])
        return trial

    @contextmanager
    def heartbeat(self, trial: optuna.Trial) -> Iterator[None]:
        """Shows other machines, within the block, that this process is working on a trial."""
        beats = get_heartbeat_thread(trial._trial_id, self._study._storage)
        beats.start()
        try:
            yield
        finally:
            beats.join()

    def tell(self, trial: optuna.Trial, value: float | None, state: TrialState) -> None:
        """Records how a trial ended."""
        self._study.tell(trial, value, state=state)

    def trial_folder(self, number: int) -> Path:
        """Temporary directory of a trial."""
        return self.folder / "trials" / str(number)

    def _fail_dead_trials(self) -> None:
        """Marks running trials of killed processes as failed, so that they do not count."""
        if self._in_database:
            optuna.storages.fail_stale_trials(self._study)
            return
        for trial in self.trials:
            worker = trial.user_attrs.get("worker")
            if trial.state != TrialState.RUNNING or worker == self._name:
                continue
            if worker is None or not is_held(self._workers / worker):
                self._study.tell(trial.number, state=TrialState.FAIL)
                shutil.rmtree(self.trial_folder(trial.number), ignore_errors=True)
                shutil.rmtree(self._workers / str(worker), ignore_errors=True)


def _sampler(seed: int, position: int) -> TPESampler:
    """The sampler of trial `position` of the budget.

    Each trial has its own: with a shared one, a resumed search would repeat its first draws, and so would a second
    process.
    """
    own_seed = int(hash_uniform_u64(_TRIALS_STREAM, seed, position, np.zeros(1, dtype=np.int64))[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(seed=own_seed % 2**32, multivariate=True, constant_liar=True)


@dataclass(frozen=True)
class Outcome:
    """Results of a search so far; accuracies are on the validation split after the last epoch, in [0, 1].

    Attributes:
        overrides: Overrides of the best trial, the earliest of equals; empty if the settings as given are best.
        value: Accuracy of the best trial, a mean over seeds.
        default_value: Accuracy of the settings as given; None if their trial diverged or is not complete.
        by_seed: Accuracies of the best trial by seed.
        trials: Number of complete, pruned and diverged trials.
        pruned: Number of trials that were stopped early.
        diverged: Number of trials with a loss that is not finite.
    """

    overrides: list[str]
    value: float
    default_value: float | None
    by_seed: list[float]
    trials: int
    pruned: int
    diverged: int


def outcome(study: Search) -> Outcome | None:
    """Results of a search; None until a trial is complete."""
    ended = [t for t in study.trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    ranked = ranking(study)
    if not ranked:
        return None
    best = ranked[0]
    diverged = sum(bool(t.user_attrs.get("diverged")) for t in ended)
    return Outcome(
        list(best.user_attrs["overrides"]),
        best.value or 0.0,
        next((t.value for t in ranked if t.user_attrs.get("default")), None),
        list(best.user_attrs["by_seed"]),
        trials=len(ended),
        pruned=len(ended) - len(ranked) - diverged,
        diverged=diverged,
    )


def ranking(study: Search) -> list[FrozenTrial]:
    """The complete trials, best first; of equals the earliest first."""
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number))


def standard_error(accuracy: float, images: int) -> float:
    """Binomial standard error of an accuracy p in [0, 1] on n images: sqrt(p (1 - p) / n)."""
    return math.sqrt(accuracy * (1 - accuracy) / images)


def write_outcome(output: Path, study: Search, facts: dict[str, Any]) -> None:
    """Writes `<method>.yaml`, once a trial is complete."""
    if (found := outcome(study)) is None:
        return
    error = standard_error(found.value, facts["validation_images"])
    content = {"method": facts["method"], **asdict(found), "standard_error": error, **facts}
    write_yaml(output / f"{facts['method']}.yaml", yaml.safe_dump(content, sort_keys=False, width=120))


def show_outcome(output: Path, study: Search, facts: dict[str, Any], words: Sequence[str]) -> None:
    """Prints the best trials, the gain over the settings as given, and the commands that use the best trial.

    Raises:
        UserError: If no trial is complete.
    """
    if (found := outcome(study)) is None:
        ended = sum(trial.state.is_finished() for trial in study.trials)
        raise UserError(f"{output}: no trial is complete ({ended} ended early), so there are no settings to choose")
    rows = (
        (
            str(trial.number),
            f"{100 * (trial.value or 0.0):.2f}",
            "  ".join(trial.user_attrs["overrides"]) or "settings as given",
        )
        for trial in ranking(study)[:_SHOWN_TRIALS]
    )
    title = f"{facts['method']}: the best of {found.trials} trials"
    print_table(title, ("trial", "validation %", "settings"), rows, left=("settings",))
    images = facts["validation_images"]
    error = 100 * standard_error(found.value, images)
    if found.default_value is None:
        gain = "the settings as given have no complete trial"
    else:
        default = 100 * found.default_value
        gain = f"{100 * found.value - default:+.2f} points over the {default:.2f} % of the settings as given"
    print(
        f"best {100 * found.value:.2f} %, {gain}; with {images} validation images the standard error of an "
        f"accuracy is about {error:.2f} points, sqrt(p(1-p)/n).  {found.pruned} pruned, {found.diverged} diverged"
        f"  -> {output / facts['method']}.yaml"
    )
    chosen = ("method", *map(key_of, found.overrides))
    _print_commands(output, facts["method"], [word for word in words if key_of(word) not in chosen])


def _print_commands(output: Path, method: str, kept: Sequence[str]) -> None:
    """Prints the commands of a run and of a study with the best trial's settings and the overrides of the search."""
    best = f"$({called('ekd-tune')} --print {typed(output / f'{method}.yaml')})"
    fraction = [word.partition("=")[2] for word in kept if key_of(word) == "data.fraction"]
    options = ["--tuned", typed(output), *(["--fractions", fraction[-1]] if fraction else [])]
    print_next(
        " ".join(["ekd-train", f"method={method}", *map(shell_word, kept), best]),
        *compare_command(method, output / "compare", kept, *options),
    )
