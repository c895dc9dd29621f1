"""Attacks by what somebody else wrote: no code that a record names runs, no student but the run's own is believed."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from whole_runs import Outcome, call_train

from ekd_lightning.cli import compare, evaluate, export
from ekd_lightning.config.overrides import split_config_dir
from ekd_lightning.errors import UserError
from ekd_lightning.files import write_json
from ekd_lightning.networks import load_student, save_student
from ekd_lightning.pipeline import export as pipeline_export
from ekd_lightning.runs.directory import OVERRIDES, RunDirectory
from ekd_lightning.runs.lock import DirectoryLock
from ekd_lightning.runs.writer import RunWriter
from ekd_lightning.studies.multirun import split_words
from ekd_lightning.studies.sweep import Job, Sweep

FEW = ("method=branched_ce", "student.branches=2", "data.fraction=0.5", "trainer.max_epochs=3", "recipe.epochs=4")
EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory) -> Path:
    """A run of two branches that may go on."""
    outcome = train(tmp_path_factory.mktemp("finished") / "run", *FEW)
    assert outcome.code == 0, outcome.err
    return outcome.directory


@pytest.fixture
def run(run, tmp_path, monkeypatch) -> Iterator[Path]:
    """A copy of it beside a module that leaves a mark when it runs; the mark must not be there at the end."""
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield run
    assert not (tmp_path / "ran").exists()
    sys.modules.pop("evil", None)


def add_words(directory: Path, *words: object) -> None:
    path = directory / ".hydra" / "overrides.yaml"
    RunWriter(directory).write_yaml(OVERRIDES, yaml.safe_dump([*yaml.safe_load(path.read_text()), *words]))


def set_config(directory: Path, **values: object) -> None:
    RunWriter(directory).write_yaml("config.yaml", yaml.safe_dump({**RunDirectory(directory).config(), **values}))


def called(capsys, main, *words: object) -> tuple[int, str]:
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr().err


def assert_refused(outcome: Outcome, *named: str) -> None:
    assert outcome.code == 2, outcome.err
    (line,) = outcome.err.splitlines()
    assert [part for part in named if part not in line] == [], line


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("+hydra.callbacks.x={_target_: evil.Cb}", "overrides.yaml: holds"),
        ("hydra.job_logging.handlers.file.class=evil.Handler", "overrides.yaml: holds"),
        ("hydra.searchpath=[file://.]", "overrides.yaml: holds"),
        ("--config-dir=.", "overrides.yaml: holds"),
        ("+experiment=../../../../evil", "overrides.yaml: holds"),
        ("imports=[evil]", "add 'imports=[evil]' to your command"),
        ("+callbacks.x={_target_: evil.Cb}", "must begin with one of"),
        (
            "+callbacks.x={_target_: ekd_lightning.training.trainer.torch.load, f: evil.pt}",
            "defines no class of Lightning",
        ),
    ],
)
def test_a_resumed_run_runs_no_code_of_its_record(run, resume, word, named):
    add_words(run, word)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert_refused(resume(run, "trainer.max_epochs=4"), named)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_resumed_run_takes_modules_from_where_the_user_is_and_not_from_where_its_record_was(run, resume, tmp_path):
    (mine := tmp_path / "mine").mkdir()
    (mine / "evil.py").write_text("MINE = True\n")
    moved = Path(shutil.move(run, mine / "run"))
    add_words(moved, "imports=[evil]")
    set_config(moved, imports=["evil"])
    record = RunDirectory(moved).provenance()
    write_json(moved / "provenance.json", {**record, "working_directory": str(tmp_path)})
    outcome = resume(moved, "imports=[evil]", "trainer.max_epochs=4")
    assert outcome.code == 0, outcome.err
    assert sys.modules["evil"].MINE
    run.mkdir()


@pytest.mark.parametrize("main", [evaluate.main, export.main])
def test_modules_of_a_record_are_imported_when_the_user_says_so(run, tmp_path, capsys, main):
    set_config(run, imports=["evil"])
    code, err = called(capsys, main, run, "--force")
    assert code == 2
    assert f"{run}: its record names code (imports=[evil]), which is imported only with your consent" in err
    assert "--trust, or imports=[evil]" in err
    assert "evil" not in sys.modules
    for trust in ("--trust", "imports=[evil]"):
        assert called(capsys, main, run, trust, "--force")[0] == 0
        assert sys.modules.pop("evil").__file__ == str(tmp_path / "evil.py")
        (tmp_path / "ran").unlink()


SWEEP: dict[str, dict[str, Any]] = {
    "job": {"jobs": [{"directory": "0", "overrides": ["hydra.callbacks.x={_target_: evil.Cb}"]}]},
    "common": {"common": ["--config-dir=."]},
    "imports": {"common": ["imports=[evil]"]},
    "launcher": {"hydra": ["hydra.launcher.setup=[evil]"]},
    "search path": {"hydra": ["hydra.searchpath=[file://.]"]},
    "config": {"config_name": "../../evil"},
    "folder": {"config_dir": "."},
    "outside": {"jobs": [{"directory": "../run", "overrides": []}]},
    "elsewhere": {"jobs": [{"directory": "/tmp", "overrides": []}]},
}


@pytest.mark.parametrize("what", SWEEP)
def test_a_resumed_sweep_runs_no_code_of_its_plan(run, what):
    plan: dict[str, Any] = {"started": "", "working_directory": "", "config_name": "train", "config_dir": None}
    plan |= {"hydra": [], "common": [], "jobs": [{"directory": "0", "overrides": ["seed=1"]}], **SWEEP[what]}
    folder = run.parent / "sweep"
    write_json(folder / "sweep.json", plan)
    outcome = call_train(f"resume={folder}", directory=folder)
    assert_refused(outcome, str(folder))
    assert [path.name for path in folder.iterdir()] == ["sweep.json"]


@pytest.mark.parametrize(
    "words", [{"common": ["imports=[evil]"]}, {"common": ["hydra/job_logging=evil"]}, {"row": True}]
)
def test_a_continued_study_runs_no_code_of_its_plan(run, capsys, words):
    row = {"overrides": ["method=ce", *(["+hydra.callbacks.x={_target_: evil.Cb}"] if "row" in words else [])]}
    study = {"rows": {"ce": {**row, "without": []}}, "fractions": [0.1], "seeds": [0], "data": "digits"}
    folder = run.parent / "study"
    write_json(folder / "study.json", {**study, "common": words.get("common", []), "working_directory": ""})
    code, err = called(capsys, compare.main, "--output", folder)
    assert code == 2
    assert "study" in err
    assert [path.name for path in folder.iterdir()] == ["study.json"]


# -- students that are not the run's --------------------------------------------------------------------------


def zeros(student):
    with torch.no_grad():
        for tensor in student.state_dict().values():
            tensor.zero_()


def not_numbers(student):
    with torch.no_grad():
        next(student.parameters()).view(-1)[0] = torch.nan


def one_bit(student):
    with torch.no_grad():
        next(student.parameters()).view(torch.int32).view(-1)[0] ^= 1


@pytest.mark.parametrize("change", [zeros, not_numbers, one_bit])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_student_that_is_not_the_runs_is_refused_by_name(run, capsys, change, recorded):
    if not recorded:  # as in version 0.1: then only its accuracy tells
        result = json.loads((run / "result.json").read_text())
        write_json(run / "result.json", {name: value for name, value in result.items() if name != "student_sha256"})
    student = load_student(run / "student.safetensors")
    change(student)
    save_student(run / "student.safetensors", student)  # with a checksum of its own
    before = (run / "result.json").read_bytes()
    for main, words in ((export.main, []), (evaluate.main, ["--force", "--parts", "efficiency"])):
        code, err = called(capsys, main, run, *words)
        if change is one_bit and not recorded:
            continue
        assert code == 2
        assert "student.safetensors: not the student of this run" in err
        assert (run / "result.json").read_bytes() == before
        assert not (run / "export").exists()


def test_a_best_student_that_contradicts_the_record_is_refused_by_name(run, capsys):
    result = json.loads((run / "result.json").read_text())
    assert called(capsys, export.main, run, "--weights", "best")[0] == 0
    shutil.rmtree(run / "export")
    write_json(run / "result.json", {**result, "test_accuracy_best": 1 - result["test_accuracy_best"] / 2})
    code, err = called(capsys, export.main, run, "--weights", "best")
    assert code == 2
    assert "best.ckpt: not the student of this run, or damaged: its test accuracy is" in err
    assert not (run / "export").exists()


# -- folders of exports ---------------------------------------------------------------------------------------


def test_two_exports_at_once_keep_both_entries(run, monkeypatch):
    """The second one comes while the first one makes its file, and finds the folder locked."""
    genuine, waits = pipeline_export.to_bytes, threading.Event()
    second = threading.Thread(target=export.main, args=([str(run), "--format", "safetensors"],))

    class Told(DirectoryLock):
        def acquire(self):
            if threading.current_thread() is second:
                waits.set()
            super().acquire()

    def make(student, metadata, file_format):
        content = genuine(student, metadata, file_format)
        if file_format == "torch-export":
            second.start()
            assert waits.wait(60)
        return content

    monkeypatch.setattr(pipeline_export, "DirectoryLock", Told)
    monkeypatch.setattr(pipeline_export, "to_bytes", make)
    export.main([str(run), "--format", "torch-export"])
    second.join()
    record = json.loads((run / "export" / "export.json").read_text())
    assert set(record["files"]) == {"student.safetensors", "student.pt2"}
    names = ["README.md", "export.json", "student.pt2", "student.safetensors"]
    assert sorted(path.name for path in (run / "export").iterdir()) == names
    assert all(name in (run / "export" / "README.md").read_text() for name in record["files"])


def test_what_a_killed_export_left_goes_with_the_next(run, capsys):
    (run / "export").mkdir()
    (run / "export" / ".part-df404844.student.safetensors").write_bytes(b"half")
    assert called(capsys, export.main, run)[0] == 0
    assert sorted(path.name for path in (run / "export").iterdir()) == [
        "README.md",
        "export.json",
        "student.safetensors",
    ]


# -- what is the user's own goes on ---------------------------------------------------------------------------


def test_what_is_printed_to_continue_names_again_what_a_record_may_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = tuple(Job(tmp_path / "s" / str(seed), ("imports=[my_parts]", f"seed={seed}")) for seed in range(2))
    hydra = ("hydra/launcher=slurm", "hydra.sweep.dir=s", "hydra.launcher.setup=[module load x]")
    sweep = Sweep(tmp_path / "s", jobs, hydra, config_dir="my conf")
    printed = shlex.split(sweep.again)
    assert printed == ["ekd-train", "--config-dir", "my conf", "resume=s", "imports=[my_parts]"]
    config_dir, words = split_config_dir(printed)
    assert (config_dir, words) == (str(tmp_path / "my conf"), ["resume=s", "imports=[my_parts]"])
    with pytest.raises(UserError, match=r"sweep\.json: holds 'hydra\.launcher\.setup=\[module load x\]'"):
        split_words(sweep, words)
    with pytest.raises(UserError, match=r"add 'imports=\[my_parts\]' to your command"):
        split_words(sweep, ["resume=s"])
    setup = "hydra.launcher.setup=[module load y]"
    assert split_words(sweep, [*words, setup]) == (["hydra/launcher=slurm", setup], ["imports=[my_parts]"])


def test_a_run_with_modules_of_the_users_own_goes_on_when_they_are_named(train, resume, tmp_path, monkeypatch):
    mine = "from pytorch_lightning import Callback\n\nclass Mine(Callback):\n    pass\n"
    (tmp_path / "mine_of_a_test.py").write_text(mine)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = ("imports=[mine_of_a_test]", "+callbacks.x={_target_: mine_of_a_test.Mine}")
    first = train(tmp_path / "run", *FEW, *own)
    assert first.code == 0
    printed = [
        shlex.split(line) for line in first.out.splitlines() if line.startswith(("  ekd-evaluate", "  ekd-export"))
    ]
    assert [words[2] for words in printed] == ["imports=[mine_of_a_test]"] * 2
    assert_refused(resume(tmp_path / "run", "trainer.max_epochs=4"), "add 'imports=[mine_of_a_test]' to your command")
    outcome = resume(tmp_path / "run", "trainer.max_epochs=4", own[0])
    assert outcome.code == 0, outcome.err
    assert outcome.result["epochs_done"] == 4
    sys.modules.pop("mine_of_a_test")
