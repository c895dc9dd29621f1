"""What `resume=DIR` is replaced by."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_runs import result
from omegaconf import OmegaConf

from ekd_lightning.config import directory as module
from ekd_lightning.config import internals
from ekd_lightning.config.config import changes, recorded_settings, write_config
from ekd_lightning.config.directory import DIRECTORY, JobOutput
from ekd_lightning.config.overrides import anchored, check_place, check_unchanged, computing, expand_resume
from ekd_lightning.errors import UserError
from ekd_lightning.runs.directory import RunDirectory, RunState
from ekd_lightning.studies.kept_settings import refuse_changed
from ekd_lightning.studies.multirun import split_words
from ekd_lightning.studies.sweep import Job, Sweep, job_states

PLAIN = {"recipe": {"epochs": 4, "lr": 0.1}, "trainer": {"max_epochs": 4}, "tags": []}


@pytest.fixture
def run(tmp_path):
    def make(state="failed", epochs_done=None, overrides=("data=digits", "seed=3")):
        write_config(PLAIN, tmp_path)
        (tmp_path / "status.json").write_text(json.dumps({"state": state}))
        if epochs_done is not None:
            (tmp_path / "result.json").write_text(json.dumps(result(epochs_done=epochs_done)))
        (tmp_path / ".hydra").mkdir(exist_ok=True)
        (tmp_path / ".hydra" / "overrides.yaml").write_text("".join(f"- {word}\n" for word in overrides))
        return tmp_path

    return make


def test_without_resume_nothing_changes():
    for argv in (["ekd-train"], ["ekd-train", "seed=1"], ["ekd-train", "resume=null"]):
        assert expand_resume(argv) is argv


def test_recorded_overrides_come_first_and_new_ones_win(run):
    directory = run()
    found = expand_resume(["ekd-train", f"resume={directory}", "seed=4", "data=digits", "hydra.run.dir=x"])
    own = [f"resume={directory}", f"hydra.run.dir={directory}"]
    assert found == ["ekd-train", "data=digits", "seed=3", "seed=4", *own, "hydra.mode=RUN"]


def test_teachers_that_moved_are_found_from_the_current_directory(run, tmp_path, monkeypatch):
    directory = run()
    (tmp_path / "my place").mkdir()
    monkeypatch.chdir(tmp_path / "my place")
    Path("moved.safetensors").touch()
    word = "teachers.pool=[{file: moved.safetensors, options: {w: 0.5}}, {file: no}, {timm: a, weights: DEFAULT}, b]"
    found = expand_resume(["ekd-train", f"resume={directory}", word])
    assert internals.parse_override(found[3]).value() == [
        {"file": str(Path.cwd() / "moved.safetensors"), "options": {"w": 0.5}},
        {"file": "no"},
        {"timm": "a", "weights": "DEFAULT"},
        "b",
    ]
    assert expand_resume(found) == found


def test_a_child_process_gets_the_same_words_again(run):
    once = expand_resume(["ekd-train", f"resume={run()}", "trainer.max_epochs=9"])
    assert expand_resume(once) == once


@pytest.mark.parametrize(("state", "epochs_done"), [("running", None), ("failed", None), ("failed", 4), ("done", 3)])
def test_what_did_not_go_to_its_end_can_go_on(run, state, epochs_done):
    expand_resume(["ekd-train", f"resume={run(state, epochs_done)}"])


def test_what_did_cannot(run):
    with pytest.raises(UserError, match="nothing to continue"):
        expand_resume(["ekd-train", f"resume={run('done', 4)}"])


@pytest.mark.parametrize("word", ["++resume=x", "+resume=x", "~resume=x"])
def test_another_spelling_is_refused(word):
    with pytest.raises(UserError, match="must be typed resume=DIR"):
        expand_resume(["ekd-train", word])


def test_a_run_goes_on_in_its_own_directory_alone(tmp_path):
    check_place(str(tmp_path), tmp_path)
    with pytest.raises(UserError, match="must be given on the command line"):
        check_place(str(tmp_path / "x"), tmp_path)


@pytest.mark.parametrize("recipe", [[], {}, {"epochs": "4"}])
def test_a_configuration_without_epochs_is_told_by_path(run, recipe):
    directory = run("done", 4)
    write_config({**PLAIN, "recipe": recipe}, directory)
    with pytest.raises(UserError, match=r"config\.yaml: damaged"):
        expand_resume(["ekd-train", f"resume={directory}"])


@pytest.fixture
def refuse(monkeypatch):
    """Lets a job of a sweep be refused in a directory."""

    def call(directory, **settings):
        hydra = {
            "job": {"env_set": {DIRECTORY: str(directory)}},
            "runtime": {"output_dir": str(directory), "cwd": str(directory)},
            "overrides": {"task": ["seed=1"]},
        }
        held = SimpleNamespace(cfg=OmegaConf.create({"hydra": hydra}))
        monkeypatch.setattr(module.HydraConfig, "instance", lambda: held)
        JobOutput(OmegaConf.create({"resume": None, **settings})).record_refusal(UserError("no such stage"))

    return call


def test_a_refused_job_leaves_a_record_where_nothing_lies(refuse, tmp_path):
    refuse(tmp_path / "job", seed=1)
    record = RunDirectory(tmp_path / "job").record()
    assert (record.state, record.error) == (RunState.FAILED, "no such stage")
    assert RunDirectory(tmp_path / "job").config()["seed"] == 1


def test_a_refused_job_with_resume_leaves_none(refuse, tmp_path):
    refuse(tmp_path / "job", resume=str(tmp_path / "job"))
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("name", ["config.yaml", "status.json", "checkpoints/last.ckpt"])
def test_a_refused_job_leaves_the_record_of_a_run_as_it_was(refuse, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("of the run that was stopped")
    refuse(tmp_path, recipe={"lr": 0.05})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_text() == "of the run that was stopped"


@pytest.mark.parametrize("word", ["-m", "--multirun"])
def test_a_sweep_cannot_resume(run, word):
    with pytest.raises(UserError, match="multirun"):
        expand_resume(["ekd-train", word, f"resume={run()}"])


def test_a_run_without_its_start_cannot_resume(run):
    directory = run()
    (directory / ".hydra" / "overrides.yaml").unlink()
    with pytest.raises(UserError, match=r"overrides\.yaml"):
        expand_resume(["ekd-train", f"resume={directory}"])


def test_changes_have_dotted_keys():
    new = {"recipe": {"epochs": 4, "lr": 0.2, "new": 1}, "trainer": {"max_epochs": 4}, "tags": ["a"]}
    assert changes(PLAIN, new) == {"recipe.lr": (0.1, 0.2), "recipe.new": (None, 1), "tags": ([], ["a"])}
    assert changes(PLAIN, PLAIN) == {}


def test_settings_of_branches_count_as_changed_only_with_branches():
    def student(branches, **settings):
        return {"student": {"branches": branches, **settings}}

    plain = student(1), student(1, branch_gradients="sum")
    branched = student(3), student(3, branch_gradients="sum")
    assert changes(*plain) == changes(*reversed(plain)) == {}
    assert list(changes(*branched)) == ["student.branch_gradients"]
    assert list(changes(plain[0], branched[1])) == ["student.branches", "student.branch_gradients"]


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ({"student": {"branches": 1}}, {"student": {"branches": 1, "split_after": "none"}}, "student.split_after"),
        ({"recipe": {"optimizer": "adamw"}}, {"recipe": {"optimizer": "adamw", "momentum": 0.5}}, "recipe.momentum"),
    ],
)
def test_settings_that_name_weights_or_serve_other_recipes_count_as_changed(old, new, key):
    """Of one branch, `split_after` names the weights; assistants may have another optimiser than the student."""
    assert list(changes(old, new)) == [key]


def test_only_what_does_not_change_the_result_may_change(run):
    directory = run()
    check_unchanged(directory, {**PLAIN, "trainer": {"max_epochs": 2}, "tags": ["x"], "resume": "y"})
    for key, changed in (
        (r"recipe\.lr differ .* it goes on with recipe\.lr=0\.1", {**PLAIN, "recipe": {"epochs": 4, "lr": 0.2}}),
        ("trainer.devices", {**PLAIN, "trainer": {"max_epochs": 4, "devices": 2}}),
        ("tagsx", {**PLAIN, "tagsx": 1}),
    ):
        with pytest.raises(UserError, match=key):
            check_unchanged(directory, changed)


def test_a_place_may_be_another_where_there_was_one(run):
    """What lies there is compared by its hash once it is read; a word is no place."""
    directory = run()
    write_config({**PLAIN, "data": {"unlabelled": "here"}}, directory)
    check_unchanged(directory, {**PLAIN, "data": {"unlabelled": "there"}})
    for value in ("rest", None):
        with pytest.raises(UserError, match=r"data\.unlabelled"):
            check_unchanged(directory, {**PLAIN, "data": {"unlabelled": value}})
    words = ["seed=1", "++data.unlabelled=here", "data.root=x", "tags=[a]"]
    assert computing(words) == computing(["data.unlabelled=there", "seed=1"]) == ["data.unlabelled=", "seed=1"]
    assert computing(["data.unlabelled=rest", "seed=1"]) == ["data.unlabelled=rest", "seed=1"]
    assert anchored("data.unlabelled=rest") == "data.unlabelled=rest"
    assert anchored("data.unlabelled=more") == f"data.unlabelled={Path.cwd() / 'more'}"


def test_unlabelled_images_of_a_sweep_may_lie_elsewhere_but_not_be_added(tmp_path):
    jobs = (Job(tmp_path / "0", ("seed=0",)),)
    beside, alone = (Sweep(tmp_path, jobs, (), common=words) for words in (("data.unlabelled=here",), ()))
    assert split_words(beside, ["data.unlabelled=/there"]) == ([], ["data.unlabelled=/there"])
    with pytest.raises(UserError, match=r"data\.unlabelled=/there: a resumed sweep keeps its settings"):
        split_words(alone, ["data.unlabelled=/there"])
    with pytest.raises(UserError, match=r"data\.unlabelled=rest: a resumed sweep keeps its settings"):
        refuse_changed(beside, job_states(beside), [], ["data.unlabelled=rest"])


def test_flags_come_before_all_overrides(run):
    directory = run()
    found = expand_resume(["ekd-train", "--config-dir", "my_conf", f"resume={directory}"])
    assert found[:5] == ["ekd-train", "--config-dir", "my_conf", "data=digits", "seed=3"]


@pytest.mark.parametrize("text", ["a: [1", "- a list", "b: \x00"])
def test_a_damaged_configuration_is_told_by_path(run, text):
    directory = run()
    (directory / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml: damaged"):
        check_unchanged(directory, PLAIN)


def test_places_of_a_reopened_run_begin_where_it_was_started(tmp_path):
    (start := tmp_path / "start").mkdir()
    for name in ("here.safetensors", "weights"):
        (start / name).touch()
    pool = [{"file": "here.safetensors"}, {"file": "gone.safetensors"}, {"timm": "x", "weights": "weights"}, "an_id"]
    settings = {"teachers": {"pool": pool, "weights_dir": "weights", "store": "no_store"}}
    write_config(settings, tmp_path / "run")
    (tmp_path / "run" / "provenance.json").write_text(json.dumps({"working_directory": str(start)}))
    found = recorded_settings(RunDirectory(tmp_path / "run")).teachers
    assert [entry.get("file") for entry in found.pool[:3]] == [
        str(start / "here.safetensors"),
        "gone.safetensors",
        None,
    ]
    assert (found.weights_dir, found.store) == (str(start / "weights"), "no_store")
