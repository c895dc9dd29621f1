"""Search for a method's weights and temperature on the validation split, with a fixed budget of trials."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytorch_lightning as pl
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState
from pytorch_lightning.callbacks import Callback

from ekd_lightning.config.config import (
    build_callbacks,
    compose_config,
    compose_settings,
    to_plain,
    to_settings,
    warn_without_effect,
)
from ekd_lightning.config.overrides import key_of, override
from ekd_lightning.errors import UserError
from ekd_lightning.pipeline.prepare import Prepared, describe_run
from ekd_lightning.pipeline.run import run
from ekd_lightning.progress import RUN_PHASES, part, phase, renew, session
from ekd_lightning.runs.lock import check_directory
from ekd_lightning.runs.protocol import Protocol
from ekd_lightning.settings import Settings
from ekd_lightning.studies.checking import check_job
from ekd_lightning.studies.rows import SCORED_ON, warn_of_other_budgets
from ekd_lightning.studies.space import SearchSpace, default_values, derive_space, describe_space, read_space
from ekd_lightning.studies.storage import named_database
from ekd_lightning.studies.trials import Search, show_outcome, write_outcome
from ekd_lightning.training.checkpoints import BEST_METRIC
from ekd_lightning.training.module import NonFiniteLossError

log = logging.getLogger(__name__)

Report = Callable[[int, float], None]
Evaluate = Callable[[list[str], Path, Report], list[float]]
"""(overrides, folder, report) -> validation accuracy of the last epoch in [0, 1], by seed. `report(step, accuracy)`
passes an epoch's accuracy to the pruner and may raise `optuna.TrialPruned`."""


def tune(
    overrides: Sequence[str],
    output: Path,
    *,
    trials: int,
    seeds: Sequence[int],
    epochs: int | None = None,
    space_file: Path | None = None,
    timeout: float | None = None,
    sampler_seed: int = 0,
    prune: bool = True,
    storage: str | None = None,
) -> None:
    """Runs a search until its budget of trials is used up, and writes `<method>.yaml`.

    Args:
        overrides: As for ekd-train.
        output: Folder for `<method>.yaml` and the trials.
        trials: Number of trials, earlier ones included.
        seeds: Seeds of a trial; its value is their mean.
        epochs: Epochs of a trial; those of the recipe if None.
        space_file: The user's own search space; None derives one from the method.
        timeout: Seconds after which no further trial is started.
        sampler_seed: Seed of the sampler.
        prune: Whether trials below the median are stopped early.
        storage: URL of a database for the trials, for several machines; None keeps them below `output`.

    Raises:
        UserError: For a user's mistake.
    """
    base = [*overrides, *([] if epochs is None else [f"recipe.epochs={epochs}"])]
    cfg = compose_config(*base)
    settings, plain = to_settings(cfg), to_plain(cfg)
    given = None if space_file is None else read_space(space_file)
    check_directory(output)
    with session("plan", keep=False), phase("plan"), part("data, teachers and space"):
        prepared = _prepare(settings)
        space = _search_space(given, base, settings, prepared)
    warn_without_effect([key_of(word) for word in base], [settings])
    own = {"seeds": list(seeds), "sampler_seed": sampler_seed}
    facts = {"method": settings.method.name, "budget": trials, **own, **_facts(settings, prepared, space)}
    warn_of_other_budgets(output, facts)
    identity = {"config": plain, "space": facts["space"], **own}
    warmup = settings.recipe.epochs // 3 if prune else None
    folder, usual = output / settings.method.name, default_values(space, plain)
    evaluate = partial(validation_accuracies, lambda words: compose_settings(*_with(base, words)), seeds)
    with (
        named_database(storage),
        contextlib.closing(
            Search(folder, identity, space, usual, seed=sampler_seed, warmup_steps=warmup, storage=storage)
        ) as search,
    ):
        write = partial(write_outcome, output, search, facts)
        run_trials(search, evaluate, trials=trials if space else 1, timeout=timeout, after_trial=write)
        write()
        show_outcome(output, search, facts, overrides)


def _facts(settings: Settings, prepared: Prepared, space: SearchSpace) -> dict[str, Any]:
    """What the result of a search says about it, besides its method, budget and seeds."""
    shared = asdict(Protocol.of(describe_run(settings, prepared)))
    protocol = {
        **{name: value for name, value in shared.items() if value is not None},
        "val_fraction": settings.data.val_fraction,
        "student": settings.student.network,
        "branches": prepared.student.num_branches,
        "teachers": [plan.id for plan in prepared.candidates or prepared.teachers],
    }
    return {
        "scored_on": SCORED_ON,
        "validation_images": prepared.datamodule.num_val_images,
        "protocol": protocol,
        "space": describe_space(space),
    }


def _search_space(given: SearchSpace | None, base: list[str], settings: Settings, prepared: Prepared) -> SearchSpace:
    """The user's search space, checked, or the method's own."""
    if given is not None:
        check_space(base, given)
        return given
    fixed = {key_of(word) for word in base}
    space = derive_space(prepared.method, settings.method.temperature, fixed)
    if not space:
        name = settings.method.name
        log.warning("method=%s: nothing to search, so one trial is run; --space gives a search space", name)
    return space


def _with(base: list[str], overrides: Sequence[str]) -> list[str]:
    """The command line with a trial's values in place of its own for the same keys."""
    replaced = {key_of(word) for word in overrides}
    return [*(word for word in base if key_of(word) not in replaced), *overrides]


def _prepare(settings: Settings) -> Prepared:
    """Checks a trial as its run would, and the settings that a search cannot have."""
    if settings.resume is not None:
        raise UserError(f"resume={settings.resume}: has no effect in ekd-tune; the same --output continues a search")
    devices = settings.trainer.get("devices", 1)
    if devices not in (1, "1") and not (isinstance(devices, list) and len(devices) == 1):
        raise UserError(f"trainer.devices={devices}: a trial has one device; start several processes with one --output")
    if not re.fullmatch(r"\w[\w.+@-]*", settings.method.name):
        raise UserError(
            f"method.name={settings.method.name}: files are named after it; use letters, digits and _.+@- only"
        )
    prepared = check_job(settings)
    if not prepared.datamodule.num_val_images:
        raise UserError(
            f"data.val_fraction={settings.data.val_fraction:g}: leaves no validation images, by which ekd-tune "
            "chooses; set e.g. data.val_fraction=0.1"
        )
    return prepared


def check_space(base: list[str], space: SearchSpace) -> None:
    """Checks runs with the bounds and choices of a user's space, so that mistakes show before the first trial."""
    probes = {
        key: values.choices if isinstance(values, CategoricalDistribution) else (values.low, values.high)
        for key, values in space.items()
    }
    for position in range(max(len(values) for values in probes.values())):
        words = [override(key, values[position % len(values)]) for key, values in probes.items()]
        _prepare(compose_settings(*_with(base, words)))


def run_trials(
    study: Search,
    evaluate: Evaluate,
    *,
    trials: int,
    timeout: float | None = None,
    after_trial: Callable[[], None] = lambda: None,
) -> None:
    """Runs trials until the search has `trials`, including those of other processes and of earlier calls.

    Pruned and diverged trials count, failed ones do not. None is started after `timeout` seconds.

    Raises:
        UserError: If `evaluate` raises it. A loss that is not finite is no error: the trial counts as diverged.
    """
    start = time.monotonic()
    with session("trials", *RUN_PHASES[:-1], keep=False), phase("trials", trials) as all_trials:
        while timeout is None or time.monotonic() - start < timeout:
            trial = study.claim(trials)
            if trial is None:
                return
            all_trials.note = f"trial {trial.number}"
            try:
                _run_trial(study, trial, evaluate)
            except optuna.exceptions.UpdateFinishedTrialError:
                log.warning("trial %d: dropped, because another machine had taken it for dead", trial.number)
                continue
            all_trials.advance()
            after_trial()
    log.info("--timeout: time is over, no further trial is started; the same command continues the search")


def _run_trial(study: Search, trial: optuna.Trial, evaluate: Evaluate) -> None:
    began = time.monotonic()
    may_prune = study.prunes and not trial.user_attrs.get("default")

    def report(step: int, accuracy: float) -> None:
        trial.report(accuracy, step)
        if may_prune and trial.should_prune():
            raise optuna.TrialPruned

    folder = study.trial_folder(trial.number)
    state, value = TrialState.FAIL, None
    try:
        with study.heartbeat(trial):
            by_seed = evaluate(trial.user_attrs["overrides"], folder, report)
        trial.set_user_attr("by_seed", by_seed)
        state, value = TrialState.COMPLETE, statistics.fmean(by_seed)
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except NonFiniteLossError:
        trial.set_user_attr("diverged", True)
        state = TrialState.PRUNED
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        trial.set_user_attr("seconds", time.monotonic() - began)
        study.tell(trial, value, state)
    words = "  ".join(trial.user_attrs["overrides"]) or "settings as given"
    ended = "pruned" if value is None else f"{100 * value:.2f} %"
    log.info("trial %d: %s  %s  %.0f s", trial.number, ended, words, time.monotonic() - began)


class ReportAccuracy(Callback):
    """Reports the validation accuracy of every epoch except the last, whose accuracy is the trial's value."""

    def __init__(self, report: Report, first_step: int = 0) -> None:
        self._report, self._first_step = report, first_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports (`first_step` + epoch counted from 0, accuracy in [0, 1])."""
        last = trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        if BEST_METRIC in trainer.callback_metrics and not last:
            self._report(self._first_step + trainer.current_epoch, float(trainer.callback_metrics[BEST_METRIC]))


def validation_accuracies(
    make_settings: Callable[[list[str]], Settings],
    seeds: Sequence[int],
    overrides: list[str],
    folder: Path,
    report: Report,
) -> list[float]:
    """Trains one run per seed and never reads the test set; an `Evaluate` once the first two arguments are bound."""
    settings, values = make_settings(overrides), []
    for position, seed in enumerate(seeds):
        renew()
        own = replace(settings, seed=seed, trainer={**settings.trainer, "enable_checkpointing": False})
        callbacks = [*build_callbacks(own), ReportAccuracy(report, position * own.recipe.epochs)]
        result = run(own, folder / f"seed{seed}", sweep=folder.parent.parent.name, callbacks=callbacks, test=False)
        if "val_accuracy" not in result:
            limit = own.trainer.get("limit_val_batches")
            raise UserError(
                f"trainer.limit_val_batches={limit}: leaves no validation accuracy, by which ekd-tune chooses"
            )
        values.append(round(result["val_accuracy"], 6))  # else float32's rounding decides between equal trials
    return values
