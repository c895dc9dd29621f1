"""Pages of studies: records that keep what runs found, and where EKD stands, by scipy."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from made_runs import collection, entry, result, write_run
from scipy import stats
from whole_runs import called

from ekd_lightning import markdown as md
from ekd_lightning.cli.report import main
from ekd_lightning.errors import UserError
from ekd_lightning.files import DamagedFileError
from ekd_lightning.reporting import figures, study_pages
from ekd_lightning.reporting.blocks import blocks
from ekd_lightning.reporting.groups import group
from ekd_lightning.reporting.page import payload
from ekd_lightning.reporting.report import make_report
from ekd_lightning.reporting.report_files import each_once, page_name, runs_csv, write_records
from ekd_lightning.reporting.study_pages import lead, standings, summary_page
from ekd_lightning.runs.collection import RunEntry, collect, read_records
from ekd_lightning.runs.directory import FORMAT

EKD = (0.70, 0.72, 0.71, 0.705)
OTHERS = {
    "kd_mean": (0.66, 0.665, 0.67, 0.67),
    "camkd": (0.725, 0.74, 0.738, 0.73),
    "fitnet": (0.69, 0.735, 0.70, 0.71),
    "takd": (0.69, 0.735),
}
HARDWARE = {"cpu": "AMD EPYC", "cpu_capability": "AVX512", "gpus": [], "threads": 1, "hostname": "secret"}


def row(name: str, values: tuple[float, ...], decides: bool = True, **more: Any) -> list[RunEntry]:
    made = []
    for seed, value in enumerate(values):
        run = replace(entry(result(name, seed, value, **more), f"{name}-s{seed}"), row=name, study="s", decides=decides)
        found = {"hardware": HARDWARE, "packages": {"torch": "2.14.1"}, "working_directory": "/secret"}
        vars(run).update(config=entry(dict(run.result or {}), recipe__lr=0.05).config, provenance=found)
        made.append(run)
    return made


def replace_kept(run: RunEntry, **changes: Any) -> RunEntry:
    made = replace(run, **changes)
    vars(made).update(config=run.config, provenance=run.provenance)
    return made


@pytest.fixture
def runs() -> list[RunEntry]:
    plain = [run for name, own in OTHERS.items() for run in row(name, own, name != "fitnet", K=1)]
    costly = row("ce", (0.9, 0.91, 0.92, 0.93), student="resnet20", macs=90_000_000)
    return [*row("ekd", EKD), *row("ekd_mean", (0.8,) * 4), *plain, *costly]


def test_records_keep_what_runs_found_and_nothing_of_where_they_lay(runs: list[RunEntry], tmp_path: Path) -> None:
    (path,) = write_records([replace_kept(run, about="A study.") for run in runs], tmp_path)
    assert path.name == "cifar10.jsonl"
    assert "secret" not in path.read_text()
    kept = {run.name.split("/")[1].replace("-f0.1", ""): run for run in read_records(path)}
    assert set(kept) == {run.name for run in runs}
    for run in runs:
        back = kept[run.name]
        lost = {name for name, value in (run.result or {}).items() if back.get(name) != value and name != "teachers"}
        assert (lost, back.row, back.decides, back.setting("recipe.lr")) == (set(), run.row, run.decides, 0.05)
        assert back.provenance["hardware"]["cpu"] == "AMD EPYC"
        assert [t["sha256"] for t in back.get("teachers")] == [t["sha256"] for t in run.get("teachers")]
    assert {run.about for run in kept.values()} == {"A study."}
    again = write_records(read_records(path), tmp_path / "again")
    assert again[0].read_bytes() == path.read_bytes()
    assert [run.row for run in collect([path]).runs] == [run.row for run in read_records(path)]


def test_runs_of_two_files_of_records_are_told_apart(tmp_path: Path) -> None:
    """Both files name them after study, row, fraction and seed alone."""
    made = [run for data in ("cifar10", "cifar100") for run in row("ekd", (0.6, 0.7), data=data)]
    paths = write_records(made, tmp_path)
    report = make_report(collect(paths))
    names = {run.name: run for run in report.collection.runs}
    assert len(names) == len(made)
    for own, told in zip(report.groups, payload(report)["groups"], strict=True):
        assert {names[name].get("data") for name in told["runs"]} == {own.runs[0].get("data")}
    found = list(csv.DictReader(io.StringIO(runs_csv(report))))
    assert [(one["run"], one["counts"]) for one in found] == [(name, "True") for name in names]


def test_a_run_that_was_continued_elsewhere_names_both_machines(tmp_path: Path) -> None:
    gpu = HARDWARE | {"gpus": ["NVIDIA H200"], "hostname": "secret 2"}
    made = row("ekd", (0.7, 0.71, 0.72))
    for run, later in zip(made, ([], [HARDWARE], [gpu, HARDWARE]), strict=True):
        resumed = [{"hardware": one, "packages": {"torch": "2.15.0"}, "command": ["secret"]} for one in later]
        vars(run).update(provenance={**run.provenance, "hardware": gpu, **({"resumed": resumed} if later else {})})
    (path,) = write_records(made, tmp_path)
    assert "secret" not in path.read_text()
    for runs in (made, read_records(path)):
        assert study_pages.made_on(group(collection(*runs))) == (
            "Made on 1 × NVIDIA H200, AMD EPYC (AVX512); 1 × NVIDIA H200, AMD EPYC (AVX512), then AMD EPYC (AVX512) "
            "for `ekd` seed 1, 2: these rows differ from the others in the machine, too."
        )


def test_where_ekd_stands_is_what_scipy_says(runs: list[RunEntry]) -> None:
    (block,) = blocks(group(collection(*runs)))
    (found,) = standings(block)
    assert set(found.against) == set(OTHERS)  # no variant of EKD, and none that costs more
    assert found.best is not None
    assert found.best.label == "camkd"
    p = {}
    for name, own in OTHERS.items():
        minus = [ours - other for ours, other in zip(EKD, own, strict=False)]
        if len(own) < 3:
            assert found.side(name) == "too few runs"
            continue
        test = stats.ttest_1samp(minus, 0)
        low, high = test.confidence_interval(0.95)
        assert found.side(name) == ("above" if low > 0 else "below" if high < 0 else "level")
        assert (found.against[name].low, found.against[name].high) == pytest.approx((low, high))
        p[name] = test.pvalue
    assert {found.side(name) for name in OTHERS} == {"above", "below", "level", "too few runs"}
    first, second = sorted(("kd_mean", "camkd"), key=p.__getitem__)  # they decide: corrected for two
    assert found.against[first].p_holm == pytest.approx(2 * p[first])
    assert found.against[second].p_holm == pytest.approx(max(2 * p[first], p[second]))
    assert lead([found]).startswith("With at most 20 % of the labels, EKD is not ahead at equal cost. In 1 comparison ")
    assert "below in 1, level in 0 and above in 0 " in lead([found])
    assert lead([]).startswith("Whether EKD is ahead at equal cost with limited data is open")
    both = [*runs, *row("ekd_pooled", [other + 0.2 for other in EKD])]
    (block,) = blocks(group(collection(*both)))
    assert "paired by seed). By method: `ekd` is below in 1; `ekd_pooled` is above in 1." in lead(standings(block))


def test_a_run_evaluated_after_it_was_recorded_replaces_its_record(tmp_path: Path) -> None:
    before = row("ekd", (0.6, 0.7))
    recorded = read_records(write_records(before, tmp_path)[0])
    evaluated = [replace_kept(run, result=run.result.having(val_branch_accuracy=[0.5, 0.6])) for run in before]
    recorded = [replace_kept(run, about="A study.") for run in recorded]
    for given in ([*evaluated, *recorded], [*recorded, *evaluated]):
        kept = each_once(given)
        assert [(run.get("val_branch_accuracy"), run.about) for run in kept] == [([0.5, 0.6], "A study.")] * 2


def test_one_branch_is_compared_at_its_own_cost(runs: list[RunEntry], tmp_path: Path) -> None:
    """It is chosen by validation accuracy, not by test accuracy."""

    def branches(scores: tuple[float, ...], macs: int) -> dict[str, Any]:
        alone = [
            {"branches": [k], "accuracy": score, "nll": 1.0, "macs": macs, "num_parameters": 80_000}
            for k, score in enumerate(scores)
        ]
        whole = {"branches": [0, 1], "accuracy": 0.99, "nll": 1.0, "macs": 2 * macs, "num_parameters": 160_000}
        return {"test_subsets": [*alone, whole], "val_branch_accuracy": [0.6, 0.7], "test_branch_accuracy": [*scores]}

    plain = [run for run in runs if run.row not in ("ekd", "ekd_mean")]
    macs = max(int(run.get("macs")) for run in plain if run.row == "camkd")
    dear = [
        row("ekd", EKD, macs=2 * macs, **branches((0.95, 0.6 + seed / 100), macs))[seed] for seed in range(len(EKD))
    ]
    paths = write_records([*plain, *dear], tmp_path)
    for entries in ([*plain, *dear], [run for path in paths for run in read_records(path)]):
        (block,) = blocks(group(collection(*entries)))
        whole, alone = standings(block)
        assert (whole.ekd.label, alone.ekd.label) == ("ekd", "ekd, one branch")
        assert alone.ekd.by_seed("test_accuracy") == {seed: 0.6 + seed / 100 for seed in range(len(EKD))}
        assert (alone.ekd.mean("macs"), whole.ekd.mean("macs")) == (macs, 2 * macs)
        for name, own in OTHERS.items():
            expected = [0.6 + seed / 100 - other for seed, other in enumerate(own) if seed < len(EKD)]
            assert alone.against[name].mean == pytest.approx(sum(expected) / len(expected))
    assert lead([whole, alone]) == lead([whole])
    single = [
        replace_kept(run, row="ekd_single", name=f"single-{run.name}")
        for run in row("ekd", (0.59,) * 4, K=1, macs=macs)
    ]
    (block,) = blocks(group(collection(*plain, *dear, *single)))
    whole, alone = standings(block)  # EKD with one branch is another method
    assert alone.against["ekd_single"].mean == pytest.approx(0.025)
    assert "ekd_single" in whole.against
    for lacks in ({"test_branch_accuracy": [None, None]}, {"test_subsets": [{"branches": [1]}]}):  # nothing to compare
        less = [run.having(result=run.result.having(**lacks)) for run in dear]
        (block,) = blocks(group(collection(*plain, *less)))
        assert [one.ekd.label for one in standings(block)] == ["ekd"]
    heads = [row("ekd", EKD, macs=macs, **branches((0.9, 0.6), macs))[seed] for seed in range(len(EKD))]
    (block,) = blocks(group(collection(*plain, *heads)))
    assert [one.ekd.label for one in standings(block)] == ["ekd"]  # one head costs what three do


def test_a_method_with_too_few_runs_hides_no_other(runs: list[RunEntry]) -> None:
    """Its only run is the most accurate: the best of the others is compared, and it is named by itself."""
    (block,) = blocks(group(collection(*runs, *row("crd", (0.8,), K=1))))
    (found,) = standings(block)
    assert found.best is not None
    assert (found.best.label, [one.label for one in found.better]) == ("camkd", ["crd"])
    assert "below in 1, level in 0 and above in 0 " in lead([found])
    assert lead([found]).endswith(" In 1 of them a more accurate method has too few runs to tell.")
    page = summary_page(make_report(collection(*runs, *row("crd", (0.8,), K=1))))
    said = "|\n\n- cifar10, 10 %, 140 steps, `ekd`: more accurate than the best other method, with too few runs: `crd` "
    assert page.count(said) == 1
    only = [*row("ekd", EKD), *row("crd", (0.8,), K=1)]
    (found,) = standings(blocks(group(collection(*only)))[0])
    assert found.best is not None
    assert (found.best.label, found.better) == ("crd", ())
    assert lead([found]).startswith("Whether EKD is ahead at equal cost with limited data is open")


def test_of_equal_rows_of_two_studies_each_is_named(runs: list[RunEntry]) -> None:
    other = [replace(run, study="t") for run in row("camkd", OTHERS["camkd"], K=1, weight_x=2.0)]
    (block,) = blocks(group(collection(*runs, *other)))
    assert {"camkd (s)", "camkd (t)", "ekd"} <= {one.label for one in block.groups}


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"row": "ce"}', '{"row": "ce", "result": {"seed": 0, "fraction": 2}}']
    + [
        json.dumps({"row": "ce", "result": result("ce") | change} | more)
        for change, more in (
            ({"steps": [1]}, {}),
            ({"views": ["flip"]}, {}),
            ({"test_nll": float("inf")}, {}),
            ({}, {"time": 3}),
            ({}, {"provenance": {"hardware": ["cpu"]}}),
            ({}, {"provenance": {"packages": ["torch"]}}),
            ({}, {"provenance": {"resumed": ["cpu"]}}),
            ({}, {"provenance": {"resumed": [{"hardware": ["cpu"]}]}}),
        )
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"study": "s"}) + "\n" + line + "\n")
    with pytest.raises(DamagedFileError, match=r"x\.jsonl: damaged \(line 2: "):
        read_records(path)
    path.write_text(json.dumps({"study": "s"}) + "\n{}\n")
    with pytest.raises(DamagedFileError, match=r"damaged \(line 2: no 'row'\)$"):
        read_records(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_records(tmp_path / "missing.jsonl")


def write(
    folder: Path, rows: dict[str, tuple[float, ...]], others: tuple[str, ...] = (), declaration: str = "", **more: Any
) -> Path:
    """A study on disk, each row a method."""
    seeds, data = more.pop("seeds", range(10)), more.pop("data", "cifar10")
    planned: dict[str, dict[str, Any]] = {name: {"overrides": [f"method={name}"], "without": []} for name in rows}
    for name in others:
        planned[name]["decides"] = False
    content = {"rows": planned, "fractions": [0.1], "seeds": list(seeds), "common": [], "data": data, "format": FORMAT}
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(content | ({"declaration": declaration} if declaration else {})))
    for name, values in rows.items():
        for seed, value in zip(seeds, values, strict=False):
            write_run(folder / "runs" / f"{name}-f0.1-s{seed}", result(name, seed, value, data=data), **more)
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "by_cost", lambda report, _: [])


def pages(*words: object) -> tuple[int, str]:
    """Exit code, and the line that says what was wrong."""
    code, _, err = called(main, *words, "--study-pages")
    assert len(err.splitlines()) == (code != 0)
    return code, err


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["README.md", "cifar10.md", "cifar10.jsonl"])
def test_pages_replace_only_pages(tmp_path: Path, name: str) -> None:
    study, out = write(tmp_path / "a", {"ekd": EKD}), tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine\n")
    for words, said in (((), "is not empty; --force"), (("--force",), name)):
        code, err = pages(study, "-o", out, *words)
        assert (code, said in err) == (2, True), err
        assert content_of(out) == {name: b"mine\n"}


@pytest.mark.usefixtures("undrawn")
def test_runs_that_are_no_row_of_a_study_are_named(tmp_path: Path) -> None:
    study, out = write(tmp_path / "a", {"ekd": EKD}), tmp_path / "out"
    write_run(study / "runs" / "crd-f0.1-s0", result("crd", 0, 0.7))
    code, _, err = called(main, study, "-o", out, "--study-pages")
    assert (code, err.count("\n")) == (0, 1)
    assert "left out, because their study.json is missing or does not list them: runs/crd-f0.1-s0" in err
    assert {run.row for run in read_records(out / "cifar10.jsonl")} == {"ekd"}


@pytest.mark.usefixtures("undrawn")
def test_records_that_are_not_given_are_not_lost(tmp_path: Path) -> None:
    first, second, out = write(tmp_path / "a", {"ekd": EKD}), write(tmp_path / "b", {"camkd": EKD}), tmp_path / "out"
    assert pages(first, "-o", out) == (0, "")
    before = content_of(out)
    code, err = pages(second, "-o", out, "--force")
    assert (
        code,
        "cifar10.jsonl: would lose runs that are not among the given ones (a/ekd-f0.1-s0 and 3 more)" in err,
    ) == (2, True)
    assert content_of(out) == before
    for _ in range(2):  # nothing is doubled
        assert pages(out / "cifar10.jsonl", first, second, "-o", out, "--force") == (0, "")
        names = [run.name for run in read_records(out / "cifar10.jsonl")]
        assert names == [f"{study}-f0.1-s{seed}" for study in ("a/ekd", "b/camkd") for seed in range(4)]


@pytest.mark.usefixtures("undrawn")
def test_studies_side_by_side_are_not_averaged(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a", {"ekd": EKD[:2]}, recipe__lr=0.1)
    write(tmp_path / "in" / "b", {"ekd": EKD[2:]}, seeds=(2, 3), recipe__lr=0.0001)
    assert pages(tmp_path / "in", "-o", tmp_path / "out") == (0, "")
    labels = {one.label: one.n for one in group(collect([tmp_path / "out" / "cifar10.jsonl"]))}
    assert labels == {"ekd (a)": 2, "ekd (b)": 2}
    write(tmp_path / "more" / "a", {"ekd": EKD[2:]}, seeds=(2, 3), recipe__lr=0.0001)
    code, err = pages(tmp_path / "in", tmp_path / "more", "-o", tmp_path / "other")
    assert (code, "both belong to row ekd of study a but differ in recipe.lr (0.1, 0.0001)" in err) == (2, True)
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("undrawn")
def test_each_data_set_has_its_own_page_and_records_whatever_it_is_called(tmp_path: Path) -> None:
    names = [
        "a b",
        "a-b",
        "a/b",
        ".hidden",
        "hidden",
        "README",
        "-x",
        f"{'long' * 100}1",
        f"{'long' * 100}2",
        "ö" * 200,
    ]
    for number, name in enumerate(names):
        write(tmp_path / "in" / str(number), {"ekd": EKD}, data=name)
    records = [tmp_path / "in"]
    for _ in range(2):  # also from the records
        assert pages(*records, "-o", tmp_path / "out", "--force") == (0, "")
        records = sorted((tmp_path / "out").glob("*.jsonl"))
        assert sorted(str(read_records(path)[0].get("data")) for path in records) == sorted(names)
        for path in records:
            text, data = path.with_suffix(".md").read_text(), str(read_records(path)[0].get("data"))
            assert text.startswith(f"# {md.prose(data)}\n")
        summary = (tmp_path / "out" / "README.md").read_text()
        assert summary.startswith("# Is EKD ahead at equal cost?")
        assert set(re.findall(r"\]\(([^)]*)\)", summary)) == {f"{path.stem}.md" for path in records}
    assert page_name("cifar10") == "cifar10.md"


@pytest.mark.usefixtures("undrawn")
def test_what_is_not_done_is_known_by_the_declaration(tmp_path: Path) -> None:
    part = write(tmp_path / "anywhere" / "one", {"ekd": (0.9, 0.8), "ce": (0.7,)}, declaration="quick", data="digits")
    failed = result("ce", 1, 0.7, data="digits")
    write_run(part / "runs" / "ce-f0.1-s1", failed, "failed", error="broke")
    for study in ("quick", Path(__file__).parents[2] / "conf" / "study" / "quick.yaml"):
        out = tmp_path / str(len(str(study)))
        assert pages(tmp_path / "anywhere", "-o", out, "--study", study) == (0, "")
        assert {run.study for run in read_records(out / "digits.jsonl")} == {"quick"}
        said = (out / "README.md").read_text().partition("## Not done\n\n")[2].splitlines()
        assert said[0] == "- digits, 10 % of the labels: 3 not run, 1 failed, of 7 runs of `quick`"
        assert said[1] == "- digits, 20 % of the labels: 7 not run, of 7 runs of `quick`"


@pytest.mark.parametrize(
    "content",
    [None, b'{"study": "x", ', b"\xff\xfe{}", b'{"study": "s"}\n{"row": "ce", "result": {"seed": 0, "fraction": 1'],
)
def test_damaged_records_are_one_line(tmp_path: Path, content: bytes | None) -> None:
    path, out = tmp_path / "some.jsonl", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    code, err = pages(path, "-o", out)
    assert (code, str(path) in err, out.exists()) == (2, True, False)


def test_a_report_on_a_study_corrects_as_its_own_table_does(tmp_path: Path) -> None:
    """Rows that decide over these alone; the others, which are marked, over all."""
    rows = {"ekd": EKD, "kd_mean": OTHERS["kd_mean"], "camkd": OTHERS["camkd"], "fitnet": OTHERS["fitnet"]}
    study = write(tmp_path / "a", rows, others=("fitnet",))
    damaged = write(tmp_path / "b", {}) / "study.json"
    write_run(damaged.parent / "runs" / "ekd-f0.1-s0", result(fraction=0.2))
    damaged.write_text("{")
    places = (study, damaged.parent)
    code, _, err = called(main, *places, "-o", tmp_path / "out", "--no-page", "--no-figures", "--reference", "ekd")
    assert (code, len(err.splitlines())) == (0, 1)
    assert "rows that do not decide the study's question: fitnet; " in err
    table = (tmp_path / "out" / "tables.md").read_text()
    assert [line for line in table.splitlines() if line.startswith("| `fitnet` † |")]
    assert table.count("†") == 2  # the row and the line below its table
    (block, _) = json.loads((tmp_path / "out" / "summary.json").read_text())["blocks"]
    found = {one["label"]: one["differences"].get("ekd") for one in block["rows"]}
    p = {name: stats.ttest_rel(values, EKD).pvalue for name, values in rows.items() if name != "ekd"}
    low, high = sorted(("kd_mean", "camkd"), key=p.__getitem__)
    expected = {low: 2 * p[low], high: max(2 * p[low], p[high]), "fitnet": max(p["fitnet"], 3 * p[low], 2 * p[high])}
    assert {name: cast(dict[str, float], found[name])["p_holm"] for name in expected} == pytest.approx(expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "by_cost", lambda report, _: [])
        assert pages(study, "-o", tmp_path / "pages") == (0, "")
    words = ("-o", tmp_path / "again", "--no-page", "--no-figures", "--reference", "ekd")
    assert (
        called(main, tmp_path / "pages" / "cifar10.jsonl", *words)[0] == 0
    )  # from records: the same, and all settings
    (again,) = json.loads((tmp_path / "again" / "summary.json").read_text())["blocks"]
    assert {one["label"]: one["differences"].get("ekd") for one in again["rows"]} == found
    lines = list(csv.DictReader((tmp_path / "again" / "runs.csv").open()))
    assert {line["recipe.lr"] for line in lines if line["method"] == "fitnet"} == {"0.1"}
