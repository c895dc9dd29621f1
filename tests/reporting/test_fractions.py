"""A share of the training images is called what was asked for, with the number of images beside it."""

from __future__ import annotations

import csv
import io

import pytest
from made_runs import result, write_run

from ekd_lightning.data import choose_subset
from ekd_lightning.data.catalog import read_digits
from ekd_lightning.pipeline.prepare import describe_run, prepare
from ekd_lightning.pipeline.run import run_name
from ekd_lightning.reporting import figure_style as fs
from ekd_lightning.reporting import figures, report_files
from ekd_lightning.reporting.page import payload
from ekd_lightning.reporting.report import make_report, summary
from ekd_lightning.runs.collection import collect


def test_a_subset_knows_the_share_that_was_asked_for():
    labels = read_digits().train.labels
    assert choose_subset(labels, fraction=0.3).fraction == 0.3  # 433 of 1,437 images
    assert choose_subset(labels).fraction == 1
    assert choose_subset(labels, per_class=10).fraction == pytest.approx(100 / len(labels))


def test_a_run_is_named_by_it(tiny_settings):
    settings = tiny_settings("data.fraction=0.3", "method=ce", "student.branches=1")
    facts = describe_run(settings, prepare(settings, "cpu"))
    assert (facts["fraction"], facts["num_train_images"] + facts["num_val_images"]) == (0.3, 433)
    assert run_name(facts) == "ce-T0-B1-f30-s0"


@pytest.fixture
def rounded(tmp_path):
    """The report of runs as version 0.1 left them: the asked share stands in config.yaml alone."""
    for asked, share, images in ((0.3, 433 / 1437, 433), (0.1, 144 / 1437, 144)):
        counts = {"num_train_images": images - 40, "num_val_images": 40, "fraction": share}
        made = {**result("ce", 0, 0.9, data="digits"), **counts, "subset_sha256": str(images)}
        write_run(tmp_path / f"ce-{images}", made, data__fraction=asked)
    return make_report(collect([tmp_path]))


def test_a_rounded_share_on_record_is_recognised_everywhere(rounded):
    titles = ["digits, 10 % of the training images (144)", "digits, 30 % of the training images (433)"]
    assert [block.title for block in rounded.blocks] == titles
    assert [block["title"] for block in summary(rounded)["blocks"]] == titles
    assert f"## {titles[1]}" in report_files.markdown(rounded)
    assert {row["fraction"] for row in csv.DictReader(io.StringIO(report_files.runs_csv(rounded)))} == {"0.1", "0.3"}
    shown = payload(rounded)
    for rows in (shown["groups"], shown["runs"]):
        assert {(row["fraction"], row["images"]) for row in rows} == {(0.1, 144), (0.3, 433)}
    with fs.style():
        (drawn,) = figures.by_fraction(rounded, fs.LineStyles([]))
    ticks = [label.get_text() for label in drawn.figure.axes[0].get_xticklabels()]
    assert sorted(ticks) == ["10\n(144)", "30\n(433)"]
