from __future__ import annotations

import json

import pytest

from ekd_lightning.runs import record
from ekd_lightning.runs.record import RunRecord, is_rank_zero


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
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_who_writes(monkeypatch, environment, expected):
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_rank_zero() is expected


def test_a_start_withdraws_an_older_result(tmp_path):
    own = RunRecord(tmp_path / "run")
    own.start(resumed=False)
    own.result({"x": 1})
    (tmp_path / "run" / "arrays.npz").write_bytes(b"its arrays")
    assert read(tmp_path / "run" / "status.json")["state"] == "done"
    RunRecord(tmp_path / "run").start(resumed=False)
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "arrays.npz").exists()
    assert read(tmp_path / "run" / "status.json")["state"] == "running"


def test_provenance_names_what_a_result_comes_from(tmp_path):
    own = RunRecord(tmp_path)
    own.start(resumed=False)
    own.add_provenance(data={"name": "digits"})
    found = read(tmp_path / "provenance.json")
    assert found.keys() >= {
        "version",
        "git",
        "command",
        "python",
        "packages",
        "platform",
        "hardware",
        "started",
    }
    assert found["packages"].keys() >= {"torch", "pytorch-lightning", "hydra-core", "numpy"}
    assert found["hardware"]["cpu"]
    assert found["data"] == {"name": "digits"}
    if found["git"]:
        assert len(found["git"]["commit"]) == 40


def test_a_resumed_start_keeps_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "now", lambda: "first")
    RunRecord(tmp_path).start(resumed=False)
    RunRecord(tmp_path).add_provenance(data="kept")
    for time in ("second", "third"):
        monkeypatch.setattr(record, "now", lambda time=time: time)
        RunRecord(tmp_path).start(resumed=True)
    found = read(tmp_path / "provenance.json")
    assert (found["started"], found["data"]) == ("first", "kept")
    assert [start["started"] for start in found["resumed"]] == ["second", "third"]


def test_done_implies_a_result(tmp_path, monkeypatch):
    own = RunRecord(tmp_path)
    own.start(resumed=False)
    with pytest.raises(TypeError):
        own.result({"x": object()})
    assert read(tmp_path / "status.json")["state"] == "running"
    assert not (tmp_path / "result.json").exists()


def test_an_error_is_kept(tmp_path):
    own = RunRecord(tmp_path)
    own.status("failed", "x=1: no")
    found = read(tmp_path / "status.json")
    assert (found["state"], found["error"]) == ("failed", "x=1: no")


def test_a_new_run_forgets_an_older_one_but_nothing_else(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    old = ("checkpoints/last.ckpt", "student.safetensors", "metrics.csv", "wandb_run_id.txt")
    kept = ("config.yaml", "train.log", "notes.txt")
    for name in (*old, *kept):
        (tmp_path / name).write_text("")
    RunRecord(tmp_path).forget_earlier_run()
    assert [name for name in old if (tmp_path / name).exists()] == []
    assert [name for name in kept if (tmp_path / name).exists()] == list(kept)
