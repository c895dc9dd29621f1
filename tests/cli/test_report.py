"""`ekd-report` from the command line to its files, and each way to ask for something impossible."""

from __future__ import annotations

import importlib.util
import json
import random
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
from made_runs import result, write_run, write_study
from whole_runs import TINY, call_teach, call_train, called

from ekd_lightning.cli.report import main
from ekd_lightning.settings import EVALUATION_PARTS

TABLES = ("--no-page", "--no-figures")


call = partial(called, main)


def refused(*words):
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("ekd-report: error: ")
    return line


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("runs"))


def test_the_tables_of_a_study(runs, tmp_path):
    code, out, err = call(runs, "-o", tmp_path / "out", *TABLES)
    assert (code, err) == (0, "")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"tables.md", "runs.csv", "summary.json"}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["files"]) == files
    assert summary["lead"] in out
    *_, files_line, empty, heading, evaluate, export = out.splitlines()
    assert (files_line, empty, heading) == (f"15 done; 3 files in {tmp_path / 'out'}", "", "next:")
    assert evaluate == f"  ekd-evaluate {runs} --parts all"
    program, run = export.split()
    assert program == "ekd-export"
    assert json.loads((Path(run) / "result.json").read_text())["method"] == "ekd"


def test_a_run_that_is_evaluated_in_full_is_exported_next_and_one_without_ekd_ends_the_report(tmp_path):
    write_run(tmp_path / "in" / "a", result() | {"evaluated": list(EVALUATION_PARTS)})
    out = call(tmp_path / "in", "-o", tmp_path / "out", *TABLES)[1]
    assert out.splitlines()[-2:] == ["next:", f"  ekd-export {tmp_path / 'in' / 'a'}"]
    write_run(tmp_path / "ce" / "a", result("ce") | {"evaluated": list(EVALUATION_PARTS)})
    assert "next:" not in call(tmp_path / "ce", "-o", tmp_path / "more", *TABLES)[1]


def test_what_comes_next_names_the_modules_that_the_runs_need(tmp_path):
    write_run(tmp_path / "a b" / "ekd", result(), imports=["my_parts", "x; y"])
    write_run(tmp_path / "a b" / "ce", result("ce"), imports=["more.parts"])
    write_run(tmp_path / "plain" / "ce", result("ce", seed=1))
    out = call(tmp_path / "a b", tmp_path / "plain", "-o", tmp_path / "out", *TABLES)[1]
    evaluate, export = map(shlex.split, out.splitlines()[-2:])
    folders = [str(tmp_path / "a b"), str(tmp_path / "plain")]
    assert evaluate == ["ekd-evaluate", *folders, "--parts", "all", "imports=[more.parts,my_parts]"]
    assert export == ["ekd-export", str(tmp_path / "a b" / "ekd"), "imports=[my_parts]"]


def test_a_folder_that_ekd_evaluate_refuses_is_not_offered_to_it(tmp_path):
    """It refuses folders with unfinished runs, and corruptions of images that are not square."""
    for folder in ("whole", "part"):
        write_run(tmp_path / folder / "a", result("ce"))
    write_run(tmp_path / "part" / "b", result("ce"), "failed", error="no")
    parts = [part for part in EVALUATION_PARTS if part != "corruptions"]
    write_run(tmp_path / "oblong" / "a", result("ce") | {"evaluated": parts})
    out = call(*(tmp_path / name for name in ("whole", "part", "oblong")), "-o", tmp_path / "out", *TABLES)[1]
    assert out.splitlines()[-2:] == ["next:", f"  ekd-evaluate {tmp_path / 'whole'} --parts all"]


def test_problems_go_to_stderr_in_a_line_each_and_the_rest_is_reported(tmp_path):
    write_study(tmp_path / "in")
    write_run(tmp_path / "in" / "half", result())
    (tmp_path / "in" / "half" / "result.json").write_text('{"meth')
    code, out, err = call(tmp_path / "in", "-o", tmp_path / "out", *TABLES)
    assert code == 0
    (line,) = err.splitlines()
    assert line.startswith("ekd-report: half/result.json: damaged, not JSON")
    assert line.endswith("; counted as failed")
    assert "15 done, 1 failed" in out
    assert "damaged, not JSON" in (tmp_path / "out" / "tables.md").read_text()


def test_an_existing_output_is_kept_without_force(runs, tmp_path):
    out = tmp_path / "out"
    call(runs, "-o", out, *TABLES)
    before = (out / "tables.md").read_text()
    assert "is not empty; --force writes over" in refused(runs, "-o", out, "--title", "New", *TABLES)
    assert (out / "tables.md").read_text() == before
    assert call(runs, "-o", out, "--title", "New", "--force", *TABLES)[0] == 0
    assert (out / "tables.md").read_text().startswith("# New\n")


def test_force_removes_what_the_earlier_report_wrote_and_nothing_else(runs, tmp_path):
    out = tmp_path / "out"
    call(runs, "-o", out, *TABLES)
    summary = json.loads((out / "summary.json").read_text())
    for path in (out / "figures" / "old.svg", out / "mine.txt", tmp_path / "outside.svg"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    summary["files"] += ["figures/old.svg", "mine.txt", "../outside.svg", 3]
    (out / "summary.json").write_text(json.dumps(summary))
    assert call(runs, "-o", out, "--force", *TABLES)[0] == 0
    assert not (out / "figures" / "old.svg").exists()
    assert (out / "mine.txt").exists()
    assert (tmp_path / "outside.svg").exists()


def test_force_does_not_write_into_another_folder(runs, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    assert "not empty and holds no report" in refused(runs, "-o", tmp_path, "--force", *TABLES)
    assert "is a file" in refused(runs, "-o", tmp_path / "thesis.tex", *TABLES)


BAD = [
    (["{runs}", "--formats", "pgn"], "unknown --formats 'pgn'; did you mean 'png'? (allowed: png, svg)"),
    (["{runs}", "--formats", ","], "--formats ',': name at least one of svg, png"),
    (["{runs}", "--reference", "kd_men", *TABLES], "unknown --reference 'kd_men'; did you mean 'kd_mean'?"),
    (["{empty}", *TABLES], "no runs found (no status.json or result.json)"),
    (["{empty}/nowhere", *TABLES], "nowhere: no such folder"),
    ([__file__, *TABLES], "test_report.py: neither a folder of runs nor a result.json nor a .jsonl file of records"),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=range(len(BAD)))
def test_a_mistake_is_one_line_and_nothing_is_written(runs, tmp_path, words, said):
    (tmp_path / "empty").mkdir()
    places = {"runs": runs, "empty": tmp_path / "empty"}
    line = refused(*(word.format(**places) for word in words), "-o", tmp_path / "out")
    assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("package", "option"), [("matplotlib", "--no-figures"), ("plotly", "--no-page")])
def test_a_missing_package_names_the_extra_and_the_option(runs, tmp_path, monkeypatch, package, option):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    line = refused(runs, "-o", tmp_path / "out")
    assert f"{package} is not installed: pip install 'ekd-lightning[report]', or leave it out with {option}" in line
    assert not (tmp_path / "out").exists()
    assert call(runs, "-o", tmp_path / "out", *TABLES)[0] == 0


HELP = {
    "bench": ("ekd-bench --parts abc", "p  where a training step's time goes"),
    "compare": ("ekd-compare --output compare/c10 --seeds 3,4",),
    "dashboard": ("ekd-dashboard --entity me --report",),
    "data": ("ekd-data cifar10", "(default: somewhere)"),
    "evaluate": ("--parts all", *EVALUATION_PARTS),
    "export": ("ekd-export RUN --format onnx --int8", "--no-fold-batch-norm"),
    "report": ("ekd-report compare/c10 compare/c100 -o report",),
    "tune": ("ekd-tune --trials 20 --output tuned/c10 method=kd_mean",),
}


@pytest.mark.parametrize(("command", "said"), HELP.items())
def test_help_has_examples(monkeypatch, command, said):
    monkeypatch.setenv("EKD_DATA_ROOT", "somewhere")
    code, out, _ = called(importlib.import_module(f"ekd_lightning.cli.{command}").main, "--help")
    assert code == 0
    assert [words for words in said if " ".join(words.split()) not in " ".join(out.split())] == []


# A command -> a word beside the option for its output, which nothing can be written to.
UNWRITABLE = {
    "bench": ("--parts", "a", "--output"),
    "compare": ("--methods", "ce", "--no-controls", "--output"),
    "report": ("{runs}", "--no-page", "--no-figures", "-o"),
    "tune": (*TINY, "method=kd_mean", "teachers.store={store}", "data.val_fraction=0.3", "--output"),
}


@pytest.mark.parametrize(("command", "words"), UNWRITABLE.items())
def test_an_output_that_cannot_be_written_is_one_line_that_names_it(runs, store, command, words):
    given = [
        word if word.startswith("teachers.pool") or "{w" in word else word.format(runs=runs, store=store)
        for word in words
    ]
    code, _, err = called(importlib.import_module(f"ekd_lightning.cli.{command}").main, *given, "/proc/nowhere/x")
    assert code == 2
    line = err.splitlines()[-1]
    assert line.startswith(f"ekd-{command}: error: ")
    assert "/proc/nowhere" in line
    assert "Traceback" not in err


@pytest.mark.parametrize("call_command", [call_train, call_teach])
def test_a_directory_that_cannot_be_made_is_one_line_that_names_it(tmp_path, call_command):
    outcome = call_command(*TINY, "hydra.run.dir=/proc/nowhere/x", directory=tmp_path / "x")
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert "error: /proc/nowhere" in line


def test_figures_and_page_get_the_report_and_are_listed(runs, tmp_path):
    code, out, err = call(runs, "-o", tmp_path / "out", "--formats", "svg")
    assert code == 0
    assert [line for line in err.splitlines() if not line.startswith(("runs", "report"))] == []  # how far it is
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    figures = [name for name in summary["files"] if name.startswith("figures/")]
    assert {name.rpartition(".")[2] for name in figures} == {"svg", "md"}
    assert [name for name in summary["files"] if not (tmp_path / "out" / name).is_file()] == []
    assert "<html" in (tmp_path / "out" / "index.html").read_text()
    assert f"open {tmp_path / 'out' / 'index.html'}\n\nnext:\n" in out


@pytest.mark.slow
def test_a_thousand_runs(tmp_path):
    """All are read, and every figure is right; docs/reporting.md tells how long it takes."""
    chance = random.Random(0)
    for number in range(1000):
        K, M, seed, fraction = (number % 5 + 1, number // 5 % 4 + 1, number // 20 % 10, (number // 200 + 1) / 10)
        made = result("ekd", seed, 0.5 + 0.3 * chance.random(), K=K, M=M, fraction=fraction)
        write_run(tmp_path / "in" / f"{number // 100}" / f"{number}", made)
    code, out, _ = call(tmp_path / "in", "-o", tmp_path / "out", *TABLES)
    assert code == 0
    assert "1000 done" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [len(block["rows"]) for block in summary["blocks"]] == [20] * 5
    assert all(row["n"] == 10 for block in summary["blocks"] for row in block["rows"])
    shutil.rmtree(tmp_path / "in")
