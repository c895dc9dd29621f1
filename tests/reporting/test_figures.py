"""Figures: all of them where the data are there, none without; n and intervals in each; text that is text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pytest
from made_runs import result, write_run
from PIL import Image

from ekd_lightning.reporting import figure_style as fs
from ekd_lightning.reporting import figures, figures_detail
from ekd_lightning.reporting.estimates import Estimate
from ekd_lightning.reporting.report import make_report
from ekd_lightning.runs.collection import collect

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("matplotlib.figure")
SVG = "{http://www.w3.org/2000/svg}"
ALL = {
    "accuracy_by_fraction", "teachers_branches", "accuracy_cost", "differences", "branches", "learning_curves",
    "reliability", "corruptions", "similarity",
}  # fmt: skip


@pytest.fixture(scope="module")
def written(rich_report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    return folder, figures.write_figures(rich_report, folder, ["svg"])


def kind(path):
    return path.name.split("-")[0]


def test_a_full_study_has_every_figure(written):
    folder, files = written
    assert {kind(path) for path in files if path.suffix == ".svg"} == ALL
    assert sorted(path.name for path in files) == sorted(path.name for path in folder.iterdir())
    assert "Left out" not in (folder / "figures.md").read_text()


def test_every_figure_says_n(written):
    folder, files = written
    for path in files:
        if path.suffix == ".svg":
            text = " ".join("".join(one.itertext()) for one in ET.parse(path).iter(f"{SVG}text"))
            assert re.search(r"n = \d", text), path.name
    captions = [line for line in (folder / "figures.md").read_text().splitlines() if line and line[0] not in "#!"]
    assert all(re.search(r"n = \d", line) for line in captions)


def test_every_caption_names_what_its_figure_shows(written):
    folder, _ = written
    captions = re.findall(r"!\[(.*)\]\((.*)\.svg\)", (folder / "figures.md").read_text())
    subjects = {
        "accuracy_by_fraction": "Test accuracy by the share of training images.",
        "teachers_branches": "Test accuracy by numbers of teachers and branches,",
        "accuracy_cost": "Test accuracy against multiply-accumulates and parameters.",
        "differences": "Mean difference in test accuracy,",
        "branches": "Test accuracy of each branch,",
        "learning_curves": "Accuracy on the validation images by epoch.",
        "reliability": "Accuracy against confidence",
        "corruptions": "Accuracy, NLL and ECE by severity,",
        "similarity": "Linear CKA",
    }
    assert {name.split("-")[0] for _, name in captions} == set(subjects)
    assert all(f". {subjects[name.split('-')[0]]}" in f". {caption}" for caption, name in captions)


def test_nothing_is_loaded_from_elsewhere(written):
    for path in written[1]:
        if path.suffix == ".svg":
            references = re.findall(r'(?:href|src)="([^"]+)"', path.read_text())
            assert all(one.startswith(("#", "data:")) for one in references)


def test_the_same_report_gives_the_same_files(rich_report, written, tmp_path):
    folder, _ = written
    kinds = {title: kind for title, kind in figures.KINDS.items() if title == "teachers × branches"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "KINDS", kinds)
        again = figures.write_figures(rich_report, tmp_path, ["svg", "png"])
    svg, png, _ = again
    assert svg.read_bytes() == (folder / svg.name).read_bytes()
    with Image.open(png) as image:
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.5)


def test_without_data_figures_are_left_out_and_it_is_said(tmp_path):
    write_run(tmp_path / "runs" / "one", result(K=1))
    report = make_report(collect([tmp_path / "runs"]))
    (listed,) = figures.write_figures(report, tmp_path / "figures", ["svg"])
    text = listed.read_text()
    assert all(f"- {title}: needs {needs}" in text for title, (needs, _) in figures.KINDS.items())


def test_single_runs_have_no_bars(tmp_path):
    for name in ("ekd", "ce"):
        write_run(tmp_path / name, result(name, 0, 0.7))
    report = make_report(collect([tmp_path]))
    with fs.style():
        assert not list(figures.by_difference(report, fs.LineStyles([])))
        (drawn,) = figures.by_cost(report, fs.LineStyles([]))
        bars = [one for axes in drawn.figure.axes for one in axes.containers if getattr(one, "has_yerr", False)]
    assert not bars
    assert "Too few runs" in drawn.caption


@pytest.mark.parametrize("costs", [(10**7, 10**7, 10**7), (10**7, 10**7, 3 * 10**7), (10**7, 10**7, 10**7 + 9)])
def test_points_of_about_equal_cost_stand_beside_each_other_where_their_cost_is_read(tmp_path, costs):
    for name, macs in zip(("ekd", "ce", "kd"), costs, strict=True):
        write_run(tmp_path / name, result(name, 0, 0.7, macs=macs))
    with fs.style():
        (drawn,) = figures.by_cost(make_report(collect([tmp_path])), fs.LineStyles([]))
        panel = drawn.figure.axes[0]
        places = [float(one[0].get_xdata()[0]) for one in panel.containers]
        left, right = panel.get_xlim()
    assert right - left > 0.1 * max(costs) / 1e6  # costs that hardly differ do not look different
    assert min(b - a for a, b in zip(sorted(places), sorted(places)[1:], strict=False)) > 0.005 * (right - left)
    for place, cost in zip(sorted(places), sorted(costs), strict=True):
        assert abs(place - cost / 1e6) < 0.05 * (right - left)


def with_half(mean: float, half: float) -> Estimate:
    return Estimate(mean, half / Estimate(mean, 1.0, 3).half, 3)


def test_bars_are_as_long_as_the_intervals():
    with fs.style():
        _, (axes,) = fs.panels(1)
        fs.points(axes, [1, 2], [with_half(0.5, 0.1), with_half(0.6, 0.2)], fs.LineStyles(["a"])("a"))
        (band,) = axes.collections
        ends = band.get_paths()[0].vertices
    assert ends[:, 1].min() == pytest.approx(40)
    assert ends[:, 1].max() == pytest.approx(80)


def test_no_state_of_pyplot_is_touched(rich_report, tmp_path):
    before = dict(matplotlib.rcParams)
    with fs.style():
        pass
    assert dict(matplotlib.rcParams) == before


def test_labels_are_no_mathematics(tmp_path):
    with fs.style():
        figure, (axes,) = fs.panels(1)
        axes.set_title("$\\broken{")
        fs.save(figure, tmp_path / "a-f0.05", ["svg"])
    assert "$\\broken{" in (tmp_path / "a-f0.05.svg").read_text()


@pytest.mark.parametrize("keys", [[f"{'long/' * 200}{end}" for end in "ab"], ["my data-f0.1", "my_data-f0.1"]])
def test_names_of_files_are_short_and_tell_blocks_apart(keys):
    names = [fs.file_name("kind", key) for key in keys]
    assert names[0] != names[1]
    assert all(re.fullmatch(r"kind-[A-Za-z0-9._-]{12,120}", name) for name in names)


def luminance(colour):
    """Relative luminance (WCAG 2.2)."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("colours", "ground"), [(fs.LIGHT, "#ffffff"), (fs.DARK, "#14171b")])
def test_marks_stand_out_from_their_ground(colours, ground):
    assert min(contrast(colour, ground) for colour in colours) >= 3


def test_text_on_heat_maps_can_be_read():
    assert min(contrast(colour, fs.INK) for colour in fs.SHADES) >= 4.5


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
BLINDNESS: dict[str, list[list[float]]] = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}  # fmt: skip


def oklab(linear):
    """Ottosson's OKLab of linear RGB [..., 3]."""
    to_lms = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
              [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
    to_lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
              [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip
    return np.cbrt(np.clip(linear, 0, 1) @ np.transpose(to_lms)) @ np.transpose(to_lab)


@pytest.mark.parametrize("kind_of_vision", BLINDNESS)
@pytest.mark.parametrize("colours", [fs.LIGHT, fs.DARK])
def test_colours_are_told_apart_with_and_without_red_or_green_cones(colours, kind_of_vision):
    channels = np.array([[int(c[at : at + 2], 16) / 255 for at in (1, 3, 5)] for c in colours])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = oklab(linear @ np.transpose(BLINDNESS[kind_of_vision]))
    away = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(len(seen), 1)]
    assert away.min() > 0.06


def test_curves_of_differently_corrupted_images_are_in_figures_of_their_own(tmp_path):
    for method, source in (("ekd", "official"), ("kd_mean", "regenerated"), ("ce", "official")):
        curves = {f"corruption_{what}_by_severity": [0.5, 0.4, 0.3, 0.2, 0.1] for what in ("accuracy", "nll", "ece")}
        write_run(tmp_path / method, result(method, corruption_source=source, corruption_images=2000, **curves))
    report = make_report(collect([tmp_path]))
    looks = fs.LineStyles([group.label for group in report.groups])
    with fs.style():
        drawn = list(figures_detail.corruption_curves(report, looks))
    found = {
        one.caption.split(", ")[2]: {text.get_text() for legend in one.figure.legends for text in legend.texts}
        for one in drawn
    }
    assert found == {"official corruptions": {"ce", "ekd"}, "regenerated corruptions": {"kd_mean"}}
    assert len({one.name for one in drawn}) == 2


@pytest.mark.parametrize("name", ["branch", "teacher"])
def test_branches_and_teachers_of_a_matrix_are_counted_from_0(monkeypatch, name):
    axes = matplotlib.figure.Figure().add_subplot()
    monkeypatch.setattr(figures_detail.details, "matrix", lambda group, key: np.eye(2))
    monkeypatch.setattr(figures_detail, "own_teachers", lambda group: [1, 0])
    figures_detail._matrix_panel(axes, SimpleNamespace(label="ekd"), "test_branch_cka", name)
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"{name} 0", f"{name} 1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["branch 0", "branch 1"]
