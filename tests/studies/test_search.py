"""Studies: budget, resume, several processes, the sampler, the search space; and that no trial reads the test set."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ekd_lightning.config.overrides import override
from ekd_lightning.errors import UserError
from ekd_lightning.training.module import NonFiniteLossError

optuna = pytest.importorskip("optuna")

from optuna.distributions import CategoricalDistribution as Choices  # noqa: E402
from optuna.distributions import FloatDistribution as Float  # noqa: E402
from optuna.distributions import IntDistribution as Int  # noqa: E402

from ekd_lightning.studies import search, storage  # noqa: E402
from ekd_lightning.studies.search import run_trials, validation_accuracies  # noqa: E402
from ekd_lightning.studies.space import default_values, derive_space, describe_space, read_space, rounded_values  # noqa: E402
from ekd_lightning.studies.trials import Search, outcome, ranking, standard_error  # noqa: E402

SPACE = {"w": Float(0.125, 8.0, log=True), "t": Int(1, 20), "kind": Choices(("a", "b"))}
DEFAULTS = {"w": 1.0, "t": 4, "kind": "b"}


def opened(folder: Path, description: dict[str, Any] | None = None, **options: Any) -> Search:
    return Search(folder, description or {"config": {"a": 1}}, SPACE, DEFAULTS, **options)


def accuracy(overrides: list[str]) -> float:
    """Best at w = 2; the default scores 0.5."""
    words = dict(word.split("=") for word in overrides)
    return 0.5 if not words else 0.9 - min(0.1 * abs(float(words["w"]) - 2.0), 0.8)


def evaluate(overrides: list[str], folder: Path, report: Any) -> list[float]:
    return [accuracy(overrides)]


def tried(study: Search) -> list[list[str]]:
    return [trial.user_attrs["overrides"] for trial in study.trials if trial.state.name != "FAIL"]


# -- the budget ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defaults", [DEFAULTS, {"w": 1.0}])
def test_the_first_trial_is_the_configuration_as_given(tmp_path, defaults):
    """Also where the space does not contain all of it."""
    study = Search(tmp_path, {}, SPACE, defaults)
    run_trials(study, evaluate, trials=4)
    assert (tried(study)[0], study.trials[0].params) == ([], defaults)
    assert all(len(words) == 3 for words in tried(study)[1:])
    found = outcome(study)
    assert (found.default_value, found.trials, found.pruned, found.diverged) == (0.5, 4, 0, 0)
    assert found.value == max(t.value for t in study.trials) >= 0.5


def test_of_equals_the_default_wins(tmp_path):
    study = opened(tmp_path)
    run_trials(study, lambda *_: [0.5, 0.7], trials=4)
    assert outcome(study).overrides == []
    assert (outcome(study).value, outcome(study).by_seed) == (pytest.approx(0.6), [0.5, 0.7])
    assert [trial.number for trial in ranking(study)] == [0, 1, 2, 3]


def test_a_resumed_study_tries_what_an_uninterrupted_one_does(tmp_path):
    """Past the sampler's random start, so that the earlier trials matter, too."""
    whole = opened(tmp_path / "whole")
    run_trials(whole, evaluate, trials=14)
    for trials in (2, 7, 7, 14):
        part = opened(tmp_path / "parts")
        run_trials(part, evaluate, trials=trials)
        assert len(tried(part)) == trials
        part.close()
    assert tried(part) == tried(whole)
    assert len({tuple(words) for words in tried(whole)}) == 14


def test_the_sampler_is_seeded(tmp_path):
    first, same, other = (opened(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    for study in (first, same, other):
        run_trials(study, evaluate, trials=4)
    assert tried(first) == tried(same)
    assert all(a != b for a, b in zip(tried(first)[1:], tried(other)[1:], strict=True))


def test_an_interrupted_trial_does_not_count_and_is_repeated(tmp_path):
    whole, broken = opened(tmp_path / "whole"), opened(tmp_path / "broken")
    run_trials(whole, evaluate, trials=3)
    for fail_at in (0, 2):

        def fails(overrides, folder, report, at=fail_at):
            folder.mkdir(parents=True)
            if len(tried(broken)) == at + 1:  # this one included
                raise KeyboardInterrupt
            return evaluate(overrides, folder, report)

        with pytest.raises(KeyboardInterrupt):
            run_trials(broken, fails, trials=3)
    run_trials(broken, evaluate, trials=3)
    assert tried(broken) == tried(whole)
    assert list((broken.folder / "trials").iterdir()) == []


# -- bad trials ---------------------------------------------------------------------------------------------


def test_hopeless_trials_are_pruned_and_count_but_never_the_default(tmp_path):
    def falls(overrides, folder, report):
        level = 0.1 if not overrides else 1.0 - 0.05 * len(study.trials)
        for epoch in range(4):
            report(epoch, level)
        return [level]

    study = opened(tmp_path, warmup_steps=1)
    run_trials(study, falls, trials=10)
    found = outcome(study)
    assert (found.trials, found.default_value) == (10, 0.1)
    assert found.pruned > 0
    pruned = [trial for trial in study.trials if trial.state.name == "PRUNED"]
    assert {trial.last_step for trial in pruned} == {1}
    study = unpruned = opened(tmp_path / "unpruned")
    run_trials(unpruned, falls, trials=10)
    assert outcome(unpruned).pruned == 0


def test_diverged_trials_count_and_other_errors_end_the_study(tmp_path):
    def diverges(overrides, folder, report):
        if not overrides:
            raise NonFiniteLossError("loss is nan")
        return [0.4]

    study = opened(tmp_path)
    run_trials(study, diverges, trials=2)
    found = outcome(study)
    assert (found.trials, found.diverged, found.pruned, found.default_value) == (2, 1, 0, None)

    def refuses(*_):
        raise UserError("no such thing")

    with pytest.raises(UserError, match="no such thing"):
        run_trials(study, refuses, trials=3)
    assert outcome(study).trials == 2


# -- several processes --------------------------------------------------------------------------------------


def test_two_processes_share_the_budget_and_try_different_things(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    claimed = [study.claim(3) for study in (first, second, first, second)]
    assert claimed[3] is None  # running trials count
    words = [trial.user_attrs["overrides"] for trial in claimed[:3]]
    assert words[0] == []
    assert words[1] != words[2]


_WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_search import evaluate, opened
from ekd_lightning.studies.search import run_trials
study = opened(Path(sys.argv[1]))
if sys.argv[3] == "die":
    import os
    study.claim(9)
    study.trial_folder(0).mkdir(parents=True)
    os._exit(9)
run_trials(study, evaluate, trials=9)
study.close()
"""


@pytest.mark.slow
def test_real_processes_on_one_study_one_of_them_killed(tmp_path):
    def start(what: str) -> subprocess.Popen:
        words = [sys.executable, "-c", _WORKER, str(tmp_path), str(Path(__file__).parent), what]
        return subprocess.Popen(words)

    assert start("die").wait() == 9
    assert opened(tmp_path).trials[0].state.name == "RUNNING"
    workers = [start("work"), start("work")]
    assert [worker.wait() for worker in workers] == [0, 0]
    study = opened(tmp_path)
    assert study.trials[0].state.name == "FAIL"
    assert outcome(study).trials == 9
    assert not study.trial_folder(0).exists()
    assert outcome(study).default_value == 0.5
    assert len({tuple(words) for words in tried(study)}) == 9


# -- another study, a damaged one ---------------------------------------------------------------------------


def test_another_configuration_is_refused_by_name(tmp_path):
    opened(tmp_path, {"config": {"a": 1, "b": {"c": (1, 2)}}, "seeds": [0]})
    opened(tmp_path, {"config": {"a": 1, "b": {"c": [1, 2]}}, "seeds": [0]})
    with pytest.raises(UserError, match=r"another configuration \(config.b.c, seeds differ\)"):
        opened(tmp_path, {"config": {"a": 1, "b": {"c": [1, 3]}}, "seeds": [0, 1]})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (storage.DESCRIPTION, "{", "search.json: damaged"),
        ("study.json", "{", "study.json: damaged"),
        (storage.JOURNAL, "{}", "holds trials but no search.json"),
    ],
)
def test_wrong_files_in_the_folder_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


def test_a_search_of_the_version_before_goes_on(tmp_path):
    opened(tmp_path).close()
    (tmp_path / storage.DESCRIPTION).rename(tmp_path / "study.json")
    opened(tmp_path).close()
    assert not (tmp_path / storage.DESCRIPTION).exists()
    with pytest.raises(UserError, match=r"another configuration \(config.a differ\)"):
        opened(tmp_path, {"config": {"a": 2}})


@pytest.mark.parametrize("text", ["not json\n{}\n", '{"op": 0}\n', '["a"]\n{}\n'])
def test_a_damaged_journal_is_refused(tmp_path, text):
    opened(tmp_path)
    (tmp_path / storage.JOURNAL).write_text(text)
    with pytest.raises(UserError, match=r"trials.journal: not a journal of trials, or damaged"):
        opened(tmp_path)


@pytest.mark.parametrize("cut", [1, 5, 60, 10**6])
def test_a_journal_that_was_cut_off_goes_on(tmp_path, cut):
    study = opened(tmp_path)
    run_trials(study, evaluate, trials=3)
    study.close()
    journal = tmp_path / storage.JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole[: max(len(whole) - cut, 7)])
    again = opened(tmp_path)
    run_trials(again, evaluate, trials=6)
    assert outcome(again).trials == 6
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    assert len({tuple(words) for words in tried(again)}) == 6
    assert len(opened(tmp_path).trials) == len(again.trials)


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    study = opened(tmp_path)
    run_trials(study, evaluate, trials=1)
    whole = (tmp_path / storage.JOURNAL).read_bytes()

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)
        with pytest.raises(UserError, match=r"trials.journal: cannot be written \(No space"):
            run_trials(study, evaluate, trials=2)
    assert (tmp_path / storage.JOURNAL).read_bytes() == whole
    run_trials(study, evaluate, trials=2)
    assert outcome(study).trials == 2


# -- a database ---------------------------------------------------------------------------------------------


def test_machines_share_a_study_in_a_database(tmp_path):
    """They have neither folders nor locks in common."""
    url = f"sqlite:///{tmp_path}/trials.db"
    one, other = (opened(tmp_path / name / "c10" / "ekd", storage=url) for name in ("a", "b"))
    claimed = [study.claim(3) for study in (one, other, one)]
    assert other.claim(3) is None
    words = [trial.user_attrs["overrides"] for trial in claimed]
    assert words[0] == []
    assert words[1] != words[2]
    for trial in claimed:
        other.tell(trial, accuracy(trial.user_attrs["overrides"]), optuna.trial.TrialState.COMPLETE)
    run_trials(one, evaluate, trials=5)
    run_trials(opened(tmp_path / "journal" / "ekd"), evaluate, trials=5)
    assert [len(tried(study)) for study in (one, other)] == [5, 5]
    with pytest.raises(
        UserError, match=r"its study c10/ekd holds a search of another configuration \(config.a differ\)"
    ):
        opened(tmp_path / "c" / "c10" / "ekd", {"config": {"a": 2}}, storage=url)
    with pytest.raises(UserError, match=r"another configuration \(storage differ\)"):
        opened(tmp_path / "a" / "c10" / "ekd")


def test_a_budget_is_kept_where_another_machine_is_faster(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/trials.db"
    one, other = (opened(tmp_path / name / "c10" / "ekd", storage=url) for name in ("a", "b"))
    ask = other._ask

    def late(counted):
        monkeypatch.setattr(other, "_ask", ask)
        assert one.claim(2) is not None
        return ask(counted)

    monkeypatch.setattr(other, "_ask", late)
    assert other.claim(2).user_attrs["overrides"] != []
    assert one.claim(2) is None
    states = [trial.state.name for trial in one.trials]
    assert states.count("RUNNING") == 2
    assert sum(bool(t.user_attrs.get("default")) for t in one.trials if t.state.name == "RUNNING") == 1


def test_a_trial_of_a_machine_that_died_is_taken_out_of_the_count(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/trials.db"
    opened(tmp_path / "a" / "ekd", storage=url).claim(1)  # and is never heard of again
    study: Any = opened(tmp_path / "a" / "ekd", storage=url)
    monkeypatch.setattr(study._study._storage._backend, "grace_period", -1)  # whatever was not heard of just now
    assert study.claim(1) is not None
    assert [trial.state.name for trial in study.trials] == ["FAIL", "RUNNING"]


def test_a_trial_that_another_machine_took_for_dead_is_dropped_and_the_search_goes_on(tmp_path, caplog):
    url = f"sqlite:///{tmp_path}/trials.db"
    study, other = (opened(tmp_path / name / "c10" / "ekd", storage=url) for name in ("a", "b"))

    def too_slow_once(overrides, folder, report):
        folder.mkdir(parents=True)
        if len(other.trials) == 1:
            other._study.tell(0, state=optuna.trial.TrialState.FAIL)
        return evaluate(overrides, folder, report)

    run_trials(study, too_slow_once, trials=2)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert [line for line in caplog.messages if "dropped" in line] == [
        "trial 0: dropped, because another machine had taken it for dead"
    ]
    assert not study.trial_folder(0).exists()


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("tuned.db", "--storage tuned.db: not the URL of a database, e.g. sqlite:///tuned.db"),
        ("sqlite:////proc/x/t.db", "--storage sqlite:////proc/x/t.db: cannot be opened ("),
        ("nosuch://me:secret@host/t", "--storage nosuch://me:***@host/t: cannot be opened ("),
    ],
)
def test_a_database_that_cannot_be_opened_is_one_line_without_its_password(tmp_path, url, named):
    with pytest.raises(UserError) as caught:
        opened(tmp_path / "ekd", storage=url)
    assert str(caught.value).startswith(named)
    assert "\n" not in str(caught.value)


def test_a_database_that_fails_later_is_one_line_too(tmp_path):
    url = f"sqlite:///{tmp_path}/trials.db"
    study = opened(tmp_path / "ekd", storage=url)
    with contextlib.closing(sqlite3.connect(tmp_path / "trials.db")) as database:
        database.execute("DROP TABLE trial_params")
    named = r"^--storage sqlite:.*trials\.db: cannot be used \(.*no such table"
    with pytest.raises(UserError, match=named), storage.named_database(url):
        run_trials(study, evaluate, trials=1)


# -- the search space ---------------------------------------------------------------------------------------


def test_the_space_of_ekd_is_its_weights_but_the_reference_and_the_temperature(tiny_settings):
    from ekd_lightning.pipeline.prepare import prepare

    settings = tiny_settings()
    method = prepare(settings, "cpu").method
    space = derive_space(method, settings.method.temperature)
    names = ("ce_branch", "kd_ensemble", "kd_branch", "feature_branch")
    assert list(space) == [*(f"method.terms.{name}.weight" for name in names), "method.temperature"]
    assert space["method.terms.kd_branch.weight"] == Float(0.9 / 8, 7.2, log=True)
    assert space["method.temperature"] == Float(1.0, 20.0, log=True)
    assert derive_space(method, 30.0)["method.temperature"].high == 30.0
    assert derive_space(method, None, fixed=set(space) - {"method.temperature"}).keys() == {"method.temperature"}


def test_a_space_file_is_read(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(
        "recipe.lr: {low: 0.01, high: 1.0, log: true}\n"
        "recipe.batch_size: {low: 16, high: 64}\n"
        "++student.ensemble: {choices: [mean_logits, null, true, 3]}\n"
    )
    space = read_space(path)
    assert space == {
        "recipe.lr": Float(0.01, 1.0, log=True),
        "recipe.batch_size": Int(16, 64),
        "++student.ensemble": Choices(("mean_logits", None, True, 3)),
    }
    config = {"recipe": {"lr": 0.1, "batch_size": 128}, "student": {"ensemble": None}}
    assert default_values(space, config) == {"recipe.lr": 0.1, "++student.ensemble": None}
    assert json.loads(json.dumps(describe_space(space)))["recipe.batch_size"]["integer"] is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("", "must map keys"),
        ("a: [", "not YAML"),
        ("a: 3", r"a=3 is not allowed; give \{low: , high: \}"),
        ("a: {low: 1}", "a: has no high"),
        ("a: {low: 2, high: 1}", "low=2 must be below high=1"),
        ("a: {low: 0, high: 1, log: true}", "a.low=0 is not allowed with log"),
        ("a: {low: 0, high: 1, log: 3}", "a.log=3 is not allowed"),
        ("a: {low: x, high: 1}", "a.low='x': must be a finite number"),
        ("a: {low: 1, hihg: 2}", "unknown key of .*hihg.*did you mean 'high'"),
        ("a: {choices: []}", r"a.choices=\[\] is not allowed"),
        ("a: {choices: [[1]]}", r"\[1\] is not a number"),
        ("seed: {choices: [0, 1]}", "seed: cannot be searched"),
        ("+data.val_fraction: {low: 0.1, high: 0.2}", "val_fraction: cannot be searched"),
    ],
)
def test_space_files_are_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "space.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_space(path)
    assert str(caught.value).startswith(("--space", "unknown key of --space"))
    assert "\n" not in str(caught.value)


@given(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**9), 10**9),
        st.floats(1e-9, 1e9),
        st.text("abcNnulTre 01.,:/-='\"{}[]()#$&~@äß"),
    )
)
@example("${a} \\'$${")
def test_hydra_reads_an_override_back_to_its_value(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    parsed = OverridesParser.create().parse_override(override("a.b", value))
    found = OmegaConf.create({"b": parsed.value()})["b"]  # OmegaConf would read ${ as an interpolation
    assert (found, type(found)) == (value, type(value))


@given(st.floats(1e-6, 1e6), st.floats(1.01, 100.0), st.floats(0, 1))
def test_tidy_values_stay_inside_and_near(low, factor, share):
    value = low * factor**share
    tidy = rounded_values({"a": Float(low, low * factor, log=True)}, {"a": value})["a"]
    assert low <= tidy <= low * factor
    assert tidy == pytest.approx(value, rel=6e-4)


@given(st.integers(0, 50), st.integers(1, 50))
def test_standard_error_is_that_of_a_mean_of_zeros_and_ones(hits, more):
    images = hits + more
    p = hits / images
    squares = hits * (1 - p) ** 2 + more * p**2
    assert standard_error(p, images) == pytest.approx((squares / images**2) ** 0.5)


# -- the test set -------------------------------------------------------------------------------------------


class Untouchable:
    """A test set whose images and labels cannot be looked at."""

    name, split, sha256, class_names = "digits", "test", "0" * 64, tuple("0123456789")

    def __len__(self) -> int:
        return 10**6

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the test set's {name} was read")


@pytest.mark.parametrize("override_", ["method=ekd", "method.teacher=best"])
def test_a_trial_never_reads_the_test_set(tmp_path, tiny_settings, monkeypatch, override_):
    from ekd_lightning.data import catalog
    from ekd_lightning.pipeline import run, teachers

    load = catalog.open_dataset

    def load_without_test(*words: Any) -> Any:
        dataset = copy.copy(load(*words))
        object.__setattr__(dataset, "test", Untouchable())  # its constructor looks at the test set's shape
        return dataset

    forbidden = object()  # not even hidden behind a score that was remembered earlier
    for place in (run, teachers):
        monkeypatch.setattr(place, "score_teachers", forbidden)
    monkeypatch.setattr(catalog, "open_dataset", load_without_test)
    reports: list[tuple[int, float]] = []
    values = validation_accuracies(
        lambda words: tiny_settings("recipe.epochs=2", override_, "data.val_fraction=0.3", *words), (0, 1),
        [], tmp_path / "trial", lambda step, value: reports.append((step, value)),
    )  # fmt: skip
    assert len(values) == 2
    assert all(0 <= value <= 1 for value in values)
    assert [step for step, _ in reports] == [0, 2]  # the first of two epochs, by seed
    assert not list(tmp_path.rglob("*.ckpt"))
    result = json.loads((tmp_path / "trial" / "seed0" / "result.json").read_text())
    assert result["partial"] is True
    assert result["val_accuracy"] == pytest.approx(values[0], abs=1e-6)
    assert not [name for name in result if name.startswith("test_")]
    with pytest.raises(AssertionError, match=r"the test set's .* was read"):  # a run with its test would
        run.run(tiny_settings(override_), tmp_path / "run")


def test_a_trial_has_the_callbacks_of_its_own_settings(tmp_path, tiny_settings, monkeypatch):
    """A search space may hold their arguments."""
    seen = []
    monkeypatch.setattr(
        search, "run", lambda *_, callbacks, **__: seen.append(callbacks[0]._swa_lrs) or {"val_accuracy": 0.5}
    )
    given = (
        "++callbacks.x._target_=pytorch_lightning.callbacks.StochasticWeightAveraging",
        "++callbacks.x.swa_lrs=0.1",
    )
    for word in ("++callbacks.x.swa_lrs=0.2", "++callbacks.x.swa_lrs=0.3"):
        validation_accuracies(lambda words: tiny_settings(*given, *words), (0, 1), [word], tmp_path, lambda *_: None)
    assert seen == [0.2, 0.2, 0.3, 0.3]
