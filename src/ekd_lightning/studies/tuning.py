"""Tuning: trials of a method on the validation split alone, the same number for every method."""

from __future__ import annotations

import logging
import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
import pytorch_lightning as pl
from optuna.trial import FrozenTrial, TrialState
from pytorch_lightning.callbacks import Callback

from ekd_lightning.errors import UserError
from ekd_lightning.pipeline.run import run
from ekd_lightning.settings import Settings
from ekd_lightning.studies.trials import TuningStudy
from ekd_lightning.training.checkpoints import BEST_METRIC
from ekd_lightning.training.module import NonFiniteLossError

log = logging.getLogger(__name__)

Report = Callable[[int, float], None]
Evaluate = Callable[[list[str], Path, Report], list[float]]
"""(overrides, folder, report) -> validation accuracy of the last epoch in [0, 1], by seed. `report(step, accuracy)`
tells an epoch's accuracy and may raise `optuna.TrialPruned`."""


def run_trials(
    study: TuningStudy,
    evaluate: Evaluate,
    *,
    trials: int,
    timeout: float | None = None,
    after_trial: Callable[[], None] = lambda: None,
) -> None:
    """Runs trials until the study has `trials` of them, with those of other processes and of earlier calls.

    Args:
        study: The study.
        evaluate: Trains with overrides; see `Evaluate`.
        trials: The budget of the study. Pruned and diverged trials count, failed ones do not.
        timeout: Seconds after which no further trial is started.
        after_trial: Called after each trial.

    Raises:
        UserError: What `evaluate` raises ends the study, except a loss that is not finite: that is how these
            weights turn out.
    """
    start = time.monotonic()
    while timeout is None or time.monotonic() - start < timeout:
        trial = study.claim(trials)
        if trial is None:
            return
        _run_trial(study, trial, evaluate)
        after_trial()
    log.info("--timeout: no further trials; the same command goes on")


def _run_trial(study: TuningStudy, trial: optuna.Trial, evaluate: Evaluate) -> None:
    began = time.monotonic()
    may_prune = study.prunes and not trial.user_attrs.get("default")

    def report(step: int, accuracy: float) -> None:
        trial.report(accuracy, step)
        if may_prune and trial.should_prune():
            raise optuna.TrialPruned

    folder = study.trial_folder(trial.number)
    state, value = TrialState.FAIL, None
    try:
        by_seed = evaluate(trial.user_attrs["overrides"], folder, report)
        trial.set_user_attr("by_seed", by_seed)
        state, value = TrialState.COMPLETE, statistics.fmean(by_seed)
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except NonFiniteLossError:
        trial.set_user_attr("diverged", True)
        state = TrialState.PRUNED
    finally:
        trial.set_user_attr("seconds", time.monotonic() - began)
        study.tell(trial, value, state)
        shutil.rmtree(folder, ignore_errors=True)
    words = "  ".join(trial.user_attrs["overrides"]) or "as given"
    ended = "pruned" if value is None else f"{100 * value:.2f} %"
    log.info("trial %d: %s  %s  %.0f s", trial.number, ended, words, time.monotonic() - began)


class ReportAccuracy(Callback):
    """Tells the validation accuracy of every epoch but the last, whose trial is over anyway."""

    def __init__(self, report: Report, first_step: int = 0) -> None:
        self._report, self._first_step = report, first_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports (`first_step` + epoch counted from 0, accuracy in [0, 1])."""
        last = trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        if BEST_METRIC in trainer.callback_metrics and not last:
            self._report(
                self._first_step + trainer.current_epoch, float(trainer.callback_metrics[BEST_METRIC])
            )


@dataclass(frozen=True)
class ValidationObjective:
    """An `Evaluate`: trains as a run does, on every seed, and never reads the test set.

    Attributes:
        make_settings: From a trial's overrides to the settings of a run.
        seeds: The runs of a trial.
        make_callbacks: The user's own callbacks, made anew for every run.
    """

    make_settings: Callable[[list[str]], Settings]
    seeds: Sequence[int]
    make_callbacks: Callable[[], list[Callback]] = list

    def __call__(self, overrides: list[str], folder: Path, report: Report) -> list[float]:
        """Validation accuracy of the last epoch, in [0, 1], for every seed."""
        values = []
        for position, seed in enumerate(self.seeds):
            settings = self.make_settings(overrides)
            trainer = {**settings.trainer, "enable_checkpointing": False}
            settings = replace(settings, seed=seed, trainer=trainer)
            callbacks = [*self.make_callbacks(), ReportAccuracy(report, position * settings.recipe.epochs)]
            result = run(
                settings,
                folder / f"seed{seed}",
                sweep=folder.parent.parent.name,
                callbacks=callbacks,
                test=False,
            )
            if "val_accuracy" not in result:
                raise UserError("trainer.limit_val_batches: leaves no validation accuracy to choose by")
            values.append(round(result["val_accuracy"], 6))  # float32's noise would decide between equals
        return values


@dataclass(frozen=True)
class Outcome:
    """What a study has found so far; accuracies are on the validation split, of the last epoch, in [0, 1].

    Attributes:
        overrides: Of the best trial; empty if that is the configuration as it was given. Of equals the earliest.
        value: Its accuracy, a mean over seeds.
        by_seed: Its accuracies.
        default_value: Accuracy of the configuration as it was given; None if it diverged.
        trials: How many were complete, pruned or diverged.
        pruned: How many were stopped early.
        diverged: How many had a loss that is not finite.
    """

    overrides: list[str]
    value: float
    by_seed: list[float]
    default_value: float | None
    trials: int
    pruned: int
    diverged: int


def outcome(study: TuningStudy) -> Outcome | None:
    """Sums a study up; None as long as no trial is complete."""
    ended = [t for t in study.trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    ranked = ranking(study)
    if not ranked:
        return None
    best = ranked[0]
    assert best.value is not None  # it is complete
    diverged = sum(bool(t.user_attrs.get("diverged")) for t in ended)
    default = next((t.value for t in ranked if t.user_attrs.get("default")), None)
    return Outcome(
        overrides=list(best.user_attrs["overrides"]),
        value=best.value,
        by_seed=list(best.user_attrs["by_seed"]),
        default_value=default,
        trials=len(ended),
        pruned=len(ended) - len(ranked) - diverged,
        diverged=diverged,
    )


def ranking(study: TuningStudy) -> list[FrozenTrial]:
    """The complete trials, best first; of equals the earliest first."""
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number))


def standard_error(accuracy: float, images: int) -> float:
    """Of an accuracy p in [0, 1] measured on n images: sqrt(p (1 - p) / n), the binomial's."""
    return math.sqrt(accuracy * (1 - accuracy) / images)
