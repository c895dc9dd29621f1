"""Settings of a sweep that goes on: further overrides that it takes, and comparison with its runs on record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from ekd_lightning.config.config import changes, read_config, to_plain
from ekd_lightning.config.mistakes import line_of
from ekd_lightning.config.overrides import changed_settings, is_under, key_of, names_place, restoring, shell_word
from ekd_lightning.errors import UserError
from ekd_lightning.keys import keys_where, may_change_between_parts
from ekd_lightning.progress import track
from ekd_lightning.runs.collection import RunEntry
from ekd_lightning.runs.directory import CONFIG, RunState
from ekd_lightning.runs.words import names_code
from ekd_lightning.studies.checking import SEED, composed, differs_by_job, named
from ekd_lightning.studies.launching import multirun_config
from ekd_lightning.studies.sweep import Job, JobState, Sweep, varied_keys


def may_be_added(word: str) -> bool:
    """Whether an override may be combined with the `resume=` of any sweep."""
    return may_change_between_parts(key_of(word)) or names_code(word)


def settings_are_kept(word: str) -> UserError:
    """The error for an override that may not be combined with the `resume=` of a sweep."""
    return UserError(
        f"{word}: a resumed sweep keeps its settings; resume= may only be combined with a launcher "
        f"(hydra/launcher=..., hydra.launcher...) and {', '.join(keys_where(may_change_between_parts))}"
    )


def with_extra(words: Sequence[str], extra: Sequence[str]) -> tuple[str, ...]:
    """The overrides of a job with further ones, which take the place of those of the same keys."""
    given = {key_of(word) for word in extra}
    kept = (w for w in words if not (key_of(w) in given or (is_under(key_of(w), given) and may_be_added(w))))
    return (*kept, *extra)


def refuse_changed(sweep: Sweep, states: Sequence[JobState], hydra_words: Sequence[str], extra: Sequence[str]) -> None:
    """Refuses to go on with configuration files that give a job other settings than those it was run with.

    Another version of the package may bring other files. An override that is not free is taken if it restores the
    settings on record and changes all jobs alike. `extra` are the further overrides of the runs.

    Raises:
        UserError: Naming the job, the keys that differ, and the overrides to add; or an override that is not taken.
    """
    added = [word for word in extra if not (may_be_added(word) or names_place(word))]
    free = [word for word in extra if word not in added]
    kept, alike = [_is_kept(state.run) for state in states], True
    if not any(kept):
        if added:
            raise settings_are_kept(added[0])
        return
    settings, first, restored = _Compositions(multirun_config(sweep, hydra_words)), None, False
    for number, (job, run) in enumerate(track(states, "comparing", "jobs")):
        if not (added or kept[number]):
            continue
        try:
            now = settings(with_extra(job.overrides, extra), number)
        except Exception as error:
            if run.is_over or line_of(error) is None:
                raise
            continue  # the check of the jobs that are left tells it
        if kept[number]:
            _refuse_changed_job(sweep, job, now)
        # The settings may be those of some of the jobs already.
        if added and (change := changes(settings(with_extra(job.overrides, free), number), now)):
            alike &= first in (None, change)
            first, restored = change, restored or kept[number]
    if not alike or (first and not restored):
        raise settings_are_kept(added[0])


class _Compositions:
    """What jobs of a multirun compose to; jobs that differ in their seed alone are composed once."""

    def __init__(self, config: DictConfig) -> None:
        self._config, self._known = config, dict[tuple[str, ...], dict[str, Any]]()

    def __call__(self, words: Sequence[str], number: int) -> dict[str, Any]:
        """The settings of a job as plain containers, by its overrides and its number."""
        others = tuple(word for word in words if not SEED.fullmatch(word))
        if len(others) + 1 == len(words) and others in self._known:
            (seed,) = {*words} - {*others}
            return {**self._known[others], "seed": int(seed.partition("=")[2])}
        with composed(self._config, words, number) as job:
            plain = to_plain(job)
            if not differs_by_job(job):
                self._known[others] = plain
        return plain


def _is_kept(run: RunEntry) -> bool:
    """Whether a run, or what there is of it, will be part of the resumed sweep's results."""
    begun = run.is_over or run.state is RunState.RUNNING or run.on_disk.can_resume()
    return begun and run.state is not RunState.PLANNED and run.on_disk.file(CONFIG) is not None


def _refuse_changed_job(sweep: Sweep, job: Job, now: dict[str, Any]) -> None:
    changed = changed_settings(job.directory, now)
    changed.pop("imports", None)  # what further code registers does not change a run
    if not changed:
        return
    words = restoring(read_config(job.directory), changed)
    if any(is_under(key_of(word), varied_keys(sweep.jobs)) for word in words):
        words = []
    raise UserError(
        f"{named(job, sweep)}: was run with other settings than it would have now ({', '.join([*changed][:5])} differ)"
        "; a sweep keeps its settings, so "
        + (f"add {' '.join(map(shell_word, words))}" if words else "run the jobs that are left as a new sweep")
    )
