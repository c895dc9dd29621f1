"""A run directory: its state by lock and files, what is written and read, and what is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from made_runs import result, write_run

from ekd_lightning.errors import UserError
from ekd_lightning.files import DamagedFileError
from ekd_lightning.runs import writer as module
from ekd_lightning.runs.directory import FORMAT, ForeignRecordError, RunState, sha256_of
from ekd_lightning.runs.lock import DirectoryLock
from ekd_lightning.runs.result import NotAResultError, Result
from ekd_lightning.runs.writer import RunWriter, is_rank_zero


def read(path):
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # Lightning's second process, in a batch script without srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "LOCAL_RANK": "1"}, False),  # in a single task
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "bash", "LOCAL_RANK": "1"}, False),  # in a shell
    ],
)
def test_who_writes(monkeypatch, environment, expected):
    for name in ("RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_NAME", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_rank_zero() is expected


def test_provenance_names_what_a_result_comes_from(tmp_path):
    own = RunWriter(tmp_path)
    own.start(resumed=False)
    own.add_provenance(data={"name": "digits"})
    found = read(tmp_path / "provenance.json")
    assert found.keys() >= {"version", "git", "command", "python", "packages", "platform", "hardware", "started"}
    assert found["packages"].keys() >= {"torch", "pytorch-lightning", "hydra-core", "numpy"}
    assert found["hardware"]["cpu"]
    assert found["data"] == {"name": "digits"}
    if found["git"]:
        assert len(found["git"]["commit"]) == 40


def test_a_resumed_start_keeps_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "provenance", lambda: {"started": "first"})
    RunWriter(tmp_path).start(resumed=False)
    RunWriter(tmp_path).add_provenance(data="kept")
    for time in ("second", "third"):
        monkeypatch.setattr(module, "provenance", lambda time=time: {"started": time})
        RunWriter(tmp_path).start(resumed=True)
    found = read(tmp_path / "provenance.json")
    assert (found["started"], found["data"]) == ("first", "kept")
    assert [start["started"] for start in found["resumed"]] == ["second", "third"]


def test_done_implies_a_result(tmp_path, monkeypatch):
    own = RunWriter(tmp_path)
    own.start(resumed=False)
    with pytest.raises(TypeError):
        own.finish(Result.of(result(x=object())))
    assert read(tmp_path / "status.json")["state"] == "running"
    assert not (tmp_path / "result.json").exists()


def test_a_new_run_forgets_an_older_one_but_nothing_else(tmp_path):
    old = (
        "result.json",
        "arrays.npz",
        "checkpoints/last.ckpt",
        "student.safetensors",
        "metrics.csv",
        "train.log",
        "rank1_train.log",
        "wandb_run_id.txt",
        "evaluation/wandb_run_id.txt",
        "teachers/resnet8-s0/wandb_run_id.txt",
        "teachers/resnet8-s0/tensorboard/events",
        "tensorboard/events",
        "evaluation/tensorboard/events",
        "export/student.safetensors",
        "export/student.int8.onnx",
        "export/README.md",
        "export/export.json",
    )
    kept = ("config.yaml", "notes.txt", "export/notes.txt", "checkpoints/mine.ckpt")
    for name in (*old, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "export/export.json").write_text(json.dumps({"card_sha256": sha256_of(b"")}))
    own = RunWriter(tmp_path)
    own.finish(Result.of(result()))
    own.start(resumed=False)
    assert read(tmp_path / "status.json")["state"] == "running"
    assert [name for name in old if (tmp_path / name).exists()] == []
    assert [name for name in kept if (tmp_path / name).exists()] == list(kept)


def test_a_new_run_keeps_an_edited_model_card(tmp_path):
    own = RunWriter(write_run(tmp_path / "run", result()))
    folder = own.path / "export"
    folder.mkdir()
    (folder / "README.md").write_text("edited")
    (folder / "export.json").write_text(json.dumps({"card_sha256": sha256_of(b"")}))
    own.start(resumed=False)
    assert [path.name for path in folder.iterdir()] == ["README.md"]


def states(path, *steps):
    own = RunWriter(path)
    for step in steps:
        step(own)
    return own.record().state


def test_what_became_of_a_run(tmp_path):
    def start(own):
        own.start(resumed=False)

    assert states(tmp_path / "planned") is RunState.PLANNED
    assert states(tmp_path / "killed", start) is RunState.STOPPED
    assert states(tmp_path / "interrupted", start, RunWriter.stop) is RunState.STOPPED
    assert states(tmp_path / "failed", start, lambda own: own.fail("no")) is RunState.FAILED
    for name, made in {"done": result(), "partial": result(partial=True)}.items():
        found = states(tmp_path / name, start, lambda own, made=made: own.finish(Result.of(made)))
        assert found is RunState(name)


@pytest.mark.parametrize("says", ["running", "failed", "done", None])
def test_a_run_runs_while_its_lock_is_held_whatever_a_file_says(tmp_path, says):
    path = write_run(tmp_path / "run", result(), says or "done")
    if says is None:
        (path / "status.json").unlink()
        (path / "result.json").unlink()
    before = RunWriter(path).record().state
    with DirectoryLock(path):
        assert RunWriter(path).record().state is RunState.RUNNING
    assert RunWriter(path).record().state is before
    assert before is not RunState.RUNNING


def test_a_result_is_read_as_it_was_written(tmp_path):
    own, made = RunWriter(tmp_path), Result.of(result(test_cka=[[1.0, None]], weight_new=0.5))
    own.write_result(made)
    found = own.read_result()
    assert found == made
    assert (found.method, found.epochs, found.split_after) == ("ekd", 2, "stage1")
    assert (found["test_cka"], found.get("weight_new"), found.get("unknown")) == ([[1.0, None]], 0.5, None)
    assert "test_cka" in found
    assert "test_accuracy_best" not in found  # has none
    assert "teacher" in found  # has none, and says so


def test_fields_of_a_newer_version_are_kept_and_written_back(tmp_path):
    own = RunWriter(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps(result(from_the_future={"a": [1]})))
    own.write_result(own.read_result().having(test_brier=0.25))
    found = read(tmp_path / "result.json")
    assert found["from_the_future"] == {"a": [1]}
    assert found["test_brier"] == 0.25
    assert found["format"] == FORMAT


def test_a_result_of_validation_alone_has_no_test_accuracy(tmp_path):
    own, made = RunWriter(tmp_path), result(partial=True)
    del made["test_accuracy"]
    own.write_result(Result.of(made))
    assert "test_accuracy" not in read(tmp_path / "result.json")
    assert np.isnan(own.read_result().test_accuracy)
    with pytest.raises(NotAResultError, match="test_accuracy"):
        Result.of({**made, "partial": False})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", "two"),
        ("epochs", 2.5),
        ("epochs", True),
        ("teachers", {}),
        ("student", 3),
        ("partial", 1),
        ("seed", "x"),
    ],
)
def test_a_field_of_another_type_is_named(field, value):
    with pytest.raises(NotAResultError, match=f"'{field}' is "):
        Result.of({**result(), field: value})


BAD = {
    "empty": ("", DamagedFileError),
    "half": ('{"method": "ekd", "da', DamagedFileError),
    "list": ("[1, 2]", DamagedFileError),
    "no result": ('{"progress": 3}', ForeignRecordError),
    "newer": (json.dumps(result(format=FORMAT + 1)), ForeignRecordError),
    "older": (json.dumps(result(format=0)), ForeignRecordError),
    "no version": (json.dumps(result(format="x")), ForeignRecordError),
}


@pytest.mark.parametrize("name", ["result.json", "status.json"])
@pytest.mark.parametrize(("content", "kind"), BAD.values(), ids=BAD)
def test_a_bad_record_is_named(tmp_path, name, content, kind):
    own = RunWriter(write_run(tmp_path / "run", result()))
    (own.path / name).write_text(content)
    with pytest.raises(kind, match=rf"{name}: "):
        own.read_result() if name == "result.json" else own.record()
    with pytest.raises(UserError, match=rf"{name}: "):
        own.finished_result()


def test_a_damaged_state_says_how_to_go_on(tmp_path):
    own = RunWriter(tmp_path)
    own.start(resumed=False)
    own.finish(Result.of(result()))
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"status\.json: .*; remove it to use the run's other files"):
        own.record()
    (tmp_path / "status.json").unlink()
    assert own.finished_result()["method"] == result()["method"]


def test_a_record_of_another_version_says_which(tmp_path):
    path = write_run(tmp_path / "run", result(format=7))
    with pytest.raises(ForeignRecordError, match=r"result\.json: written by a newer version \(format 7; 1 to 2"):
        RunWriter(path).record()


def test_a_start_that_cannot_be_recorded_keeps_the_result(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", result())

    def full(*_):
        raise UserError("No space left on device")

    monkeypatch.setattr(module, "write_json", full)
    for resumed in (True, False):
        with pytest.raises(UserError, match="No space"):
            RunWriter(path).start(resumed=resumed)
        assert RunWriter(path).record().state is RunState.DONE


@pytest.mark.parametrize("data", [[1], "digits", 3])
def test_a_group_that_is_none_costs_no_result_of_version_0_1(tmp_path, data):
    own = RunWriter(write_run(tmp_path / "run", result(fraction=0.25)))
    (own.path / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    assert own.record().result.fraction == 0.25
    with pytest.raises(DamagedFileError, match=r"config\.yaml: damaged \(data is not a mapping\)"):
        own.section("data")


def test_a_damaged_list_of_starts_is_named(tmp_path):
    (tmp_path / "provenance.json").write_text('{"started": "2026-01-01", "resumed": 5}')
    own = RunWriter(tmp_path)
    for read_it in (own.provenance, own.started, lambda: own.start(resumed=True)):
        with pytest.raises(DamagedFileError, match=r"provenance\.json: damaged"):
            read_it()


@pytest.mark.parametrize("content", ["", "- a\n", "a: [", "\0"])
def test_a_damaged_configuration_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(DamagedFileError, match=r"config\.yaml"):
        RunWriter(tmp_path).config()


def test_arrays(tmp_path):
    own = RunWriter(tmp_path)
    assert own.arrays() == {}
    own.write_arrays({})
    assert own.file("arrays.npz") is None
    own.write_arrays({"labels": np.arange(3)})
    assert own.arrays()["labels"].tolist() == [0, 1, 2]
    (tmp_path / "arrays.npz").write_bytes(b"PK")
    with pytest.raises(DamagedFileError, match=r"arrays\.npz: damaged"):
        own.arrays()


def test_a_run_that_is_not_done_has_no_result_to_go_on_with(tmp_path):
    path = write_run(tmp_path / "run", result(), "failed", error="no such stage\nmore")
    with pytest.raises(UserError, match=r"not done, its status is 'failed' \(no such stage\)"):
        RunWriter(path).finished_result()


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        (None, False),
        ("", False),
        ('{"method": "ekd", "da', False),
        (json.dumps(result()), True),
        (json.dumps({"format": FORMAT + 1}), True),
        ('{"something": "else"}', True),
    ],
)
def test_only_what_can_be_read_or_is_of_another_version_keeps_new_runs_out(tmp_path, text, taken):
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    if taken:
        with pytest.raises(UserError, match=r"holds a finished run.*overwrite=true"):
            RunWriter(tmp_path).refuse_used(overwrite=False)
        RunWriter(tmp_path).refuse_used(overwrite=True)
    else:
        RunWriter(tmp_path).refuse_used(overwrite=False)


@pytest.mark.parametrize("state", [RunWriter.stop, lambda own: own.fail("no"), lambda own: None])
def test_a_run_that_can_be_resumed_is_replaced_only_on_request(tmp_path, state):
    own = RunWriter(tmp_path)
    own.start(resumed=False)
    own.write_yaml(".hydra/overrides.yaml", "[]")
    state(own)
    own.refuse_used(overwrite=False)  # without a checkpoint nothing is lost
    own.last_checkpoint.parent.mkdir()
    own.last_checkpoint.touch()
    with pytest.raises(UserError, match=rf"unfinished run with checkpoints; resume={tmp_path} .*overwrite=true"):
        own.refuse_used(overwrite=False)
    own.refuse_used(overwrite=True)


@pytest.mark.parametrize(
    "name", ["metrics.csv", "student.safetensors", "arrays.npz", "checkpoints/last.ckpt", "config.yaml"]
)
def test_a_file_that_no_run_wrote_is_never_replaced(tmp_path, name):
    own = RunWriter(tmp_path)
    for path in (tmp_path / "tensorboard/events", tmp_path / "export/student.onnx", tmp_path / "train.log"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    before = sorted(tmp_path.rglob("*"))
    own.refuse_used(overwrite=False)
    own.start(resumed=False)
    assert set(before) <= set(tmp_path.rglob("*"))
    for own_file in ("provenance.json", "status.json"):
        (tmp_path / own_file).unlink()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"{name}: exists, and no run wrote it"):
            own.refuse_used(overwrite=overwrite)
