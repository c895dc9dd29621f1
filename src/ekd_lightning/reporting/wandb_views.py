"""Workspace and report of a W&B project, as objects of W&B's package; this module sends nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ekd_lightning.errors import require

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as reports
    from wandb_workspaces import workspaces

_ABOUT = """\
Runs of the kind `student`; teachers, assistants and later evaluations are runs of their own in the same project.
Accuracies are those of the weights after the last epoch. Bands and bars are means and standard deviations over the
runs of a group, seeds among them.
"""


def build_workspace(entity: str, project: str, name: str, group: str | None = None) -> workspaces.Workspace:
    """The workspace: the main results, then teachers and branches, curves, calibration, errors, cost.

    It shows only runs of the sweep `group`, if one is given.

    Raises:
        UserError: If the package is not installed.
    """
    ws, _ = _packages()
    filters = [ws.Metric("JobType") == "student"]
    if group is not None:
        filters.append(ws.Metric("Group") == group)
    sections = [
        ws.Section(name=title, panels=panels, is_open=number < 3)
        for number, (title, panels) in enumerate(panel_sections().items())
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=ws.And(*filters),
            groupby=[ws.Config(key) for key in _GROUPING],
            order=[ws.Ordering(ws.Summary("test_accuracy"), ascending=False)],
        ),
    )


def build_report(entity: str, project: str, name: str, group: str | None = None) -> reports.Report:
    """The same panels as a report with a short introduction; raises as `build_workspace`."""
    _, wr = _packages()
    runs = wr.Runset(
        entity=entity,
        project=project,
        name="students",
        filters="Metric('JobType') == 'student'" + (f" and Metric('Group') == {group!r}" if group else ""),
        groupby=[f"config.{key}" for key in _GROUPING],
    )
    blocks: list[Any] = [wr.MarkdownBlock(text=_ABOUT), wr.TableOfContents()]
    for title, panels in panel_sections().items():
        blocks += [wr.H2(text=title), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(
        entity=entity,
        project=project,
        title=name,
        description="Ensemble Knowledge Distillation: does it help, how much, and at what cost",
        blocks=blocks,
        width="fluid",
    )


def panel_sections() -> dict[str, list[Any]]:
    """Panels by section, of metrics that runs log.

    Raises:
        UserError: If the package is not installed.
    """
    _, wr = _packages()
    method, teachers, branches = (wr.Config(key) for key in ("method_name", "num_teachers", "num_branches"))
    accuracy = wr.SummaryMetric("test_accuracy")
    over_runs = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}

    def bars(title: str, metric: str, by: Any = method) -> Any:
        return wr.BarPlot(title=title, title_x=title, metrics=[metric], groupby=by, orientation="h", **over_runs)

    def curve(title: str, metric: str) -> Any:
        return lines(title, y=[metric], groupby=method, **over_runs)

    def lines(title: str, **what: Any) -> Any:
        return wr.LinePlot(title=title, x="epoch", title_x="epoch", title_y=title, **what)

    def scatter(title: str, key: str) -> Any:
        return wr.ScatterPlot(title=title, x=wr.Config(key), y=accuracy, log_x=True)

    parallel = [
        *(wr.ParallelCoordinatesPlotColumn(wr.Config(key)) for key in _PARAMETERS),
        wr.ParallelCoordinatesPlotColumn(accuracy),
    ]
    each_branch, each_term = "val/branch_accuracy_.*", "train/.*"
    return {
        "Answer": [
            bars("test accuracy by method", "test/accuracy"),
            scatter("accuracy against cost", "macs"),
            scatter("accuracy against labelled data", "fraction"),
            curve("validation accuracy by method", "val/accuracy"),
        ],
        "Teachers and branches": [
            bars("test accuracy by teachers", "test/accuracy", teachers),
            bars("test accuracy by branches", "test/accuracy", branches),
            bars("gain of the ensemble over its mean branch", "evaluation/test_gain_over_mean_branch", branches),
            wr.ParallelCoordinatesPlot(title="settings and test accuracy", columns=parallel),
            lines("validation accuracy of each branch", metric_regex=each_branch),
        ],
        "Training": [
            curve("loss", "train/loss"),
            lines("every term of the loss", metric_regex=each_term),
            curve("validation NLL", "val/nll"),
            lines("learning rate", y=["lr"]),
        ],
        "Calibration and diversity": [
            bars("ECE as trained", "test/ece"),
            bars("ECE after temperature scaling", "calibration/test_ece_calibrated"),
            bars("disagreement of branches", "test/disagreement"),
            bars("ambiguity", "test/ambiguity"),
            bars("agreement with the teachers", "fidelity/test_teacher_agreement"),
        ],
        "Errors": [
            wr.MediaBrowser(title="most confident mistakes", media_keys=["evaluation/misclassified"]),
            wr.WeavePanelSummaryTable(table_name="evaluation/branches"),
        ],
        "Robustness and cost": [
            bars("mean corruption error", "corruptions/corruption_mce"),
            bars("gap to the training images", "generalisation/gap_accuracy"),
            bars("sharpness (SAM)", "flatness/sharpness_sam"),
            bars("latency of one image in ms", "efficiency/latency_ms_batch1"),
            bars("seconds of training", "train_seconds"),
        ],
    }


_GROUPING = ("data_name", "fraction", "method_name")
_PARAMETERS = ("method_name", "fraction", "num_teachers", "num_branches")


def _packages() -> tuple[Any, Any]:
    require("dashboards", "wandb_workspaces")
    import wandb_workspaces.reports.v2 as wr  # noqa: PLC0415 (an optional package)
    import wandb_workspaces.workspaces as ws  # noqa: PLC0415

    return ws, wr
