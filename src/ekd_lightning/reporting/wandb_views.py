"""The saved workspace and the report of a W&B project, as objects of W&B's own package; nothing here is sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ekd_lightning.errors import UserError

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as reports
    from wandb_workspaces import workspaces

_ABOUT = """\
Runs of the kind `student`; teachers, assistants and later evaluations are runs of their own in the same project.
Accuracies are those of the weights after the last epoch. Bands and bars are means and standard deviations over the
runs of a group, seeds among them.
"""


def build_workspace(entity: str, project: str, name: str, group: str | None = None) -> workspaces.Workspace:
    """The workspace: what to look at first, then teachers and branches, curves, calibration, errors, cost.

    Args:
        entity: User or team.
        project: Project.
        name: Title of the view.
        group: Only runs of this sweep; None for all.

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
    """The same panels as a report with a few words, for people who were not there.

    Args and raises as for `build_workspace`.
    """
    _, wr = _packages()
    filters = "Metric('JobType') == 'student'" + (f" and Metric('Group') == {group!r}" if group else "")
    blocks: list[Any] = [wr.MarkdownBlock(text=_ABOUT), wr.TableOfContents()]
    for title, panels in panel_sections().items():
        runs = wr.Runset(
            entity=entity,
            project=project,
            name="students",
            filters=filters,
            groupby=[f"config.{key}" for key in _GROUPING],
        )
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
    """Panels by section; what they show are names that runs log.

    Raises:
        UserError: If the package is not installed.
    """
    _, wr = _packages()
    method, teachers, branches = (wr.Config(key) for key in ("method_name", "num_teachers", "num_branches"))
    accuracy = wr.SummaryMetric("test_accuracy")
    return {
        "Answer": [
            _bars(wr, "test accuracy by method", "test/accuracy", method),
            wr.ScatterPlot(title="accuracy against cost", x=wr.Config("macs"), y=accuracy, log_x=True),
            wr.ScatterPlot(
                title="accuracy against labelled data", x=wr.Config("fraction"), y=accuracy, log_x=True
            ),
            _curve(wr, "validation accuracy by method", "val/accuracy", method),
        ],
        "Teachers and branches": [
            _bars(wr, "test accuracy by teachers", "test/accuracy", teachers),
            _bars(wr, "test accuracy by branches", "test/accuracy", branches),
            _bars(
                wr,
                "gain of the ensemble over its mean branch",
                "evaluation/test_gain_over_mean_branch",
                branches,
            ),
            wr.ParallelCoordinatesPlot(
                title="what was run, and what came of it",
                columns=[
                    *(wr.ParallelCoordinatesPlotColumn(wr.Config(key)) for key in _PARAMETERS),
                    wr.ParallelCoordinatesPlotColumn(accuracy),
                ],
            ),
            wr.LinePlot(
                title="validation accuracy of each branch", x="epoch", metric_regex="val/branch_accuracy_.*"
            ),
        ],
        "Training": [
            _curve(wr, "loss", "train/loss", method),
            wr.LinePlot(title="every term of the loss", x="epoch", metric_regex="train/.*"),
            _curve(wr, "validation NLL", "val/nll", method),
            wr.LinePlot(title="learning rate", x="epoch", y=["lr"]),
        ],
        "Calibration and diversity": [
            _bars(wr, "ECE as trained", "test/ece", method),
            _bars(wr, "ECE after temperature scaling", "calibration/test_ece_calibrated", method),
            _bars(wr, "disagreement of branches", "test/disagreement", method),
            _bars(wr, "ambiguity", "test/ambiguity", method),
            _bars(wr, "agreement with the teachers", "fidelity/test_teacher_agreement", method),
        ],
        "Errors": [
            wr.MediaBrowser(
                title="taken for another class with confidence", media_keys=["evaluation/misclassified"]
            ),
            wr.WeavePanelSummaryTable(table_name="evaluation/branches"),
        ],
        "Robustness and cost": [
            _bars(wr, "mean corruption error", "corruptions/corruption_mce", method),
            _bars(wr, "gap to the training images", "generalisation/gap_accuracy", method),
            _bars(wr, "sharpness (SAM)", "flatness/sharpness_sam", method),
            _bars(wr, "latency of one image in ms", "efficiency/latency_ms_batch1", method),
            _bars(wr, "seconds of training", "train_seconds", method),
        ],
    }


_GROUPING = ("data_name", "fraction", "method_name")
_PARAMETERS = ("method_name", "fraction", "num_teachers", "num_branches")


def _bars(wr: Any, title: str, metric: str, groupby: Any) -> Any:
    return wr.BarPlot(
        title=title,
        metrics=[metric],
        groupby=groupby,
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
        orientation="h",
    )


def _curve(wr: Any, title: str, metric: str, groupby: Any) -> Any:
    return wr.LinePlot(
        title=title,
        x="epoch",
        y=[metric],
        groupby=groupby,
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
    )


def _packages() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as wr  # noqa: PLC0415 (an optional package)
        import wandb_workspaces.workspaces as ws  # noqa: PLC0415
    except ModuleNotFoundError:
        raise UserError(
            "saved workspaces and reports need W&B's package: pip install 'ekd-lightning[dashboards]'"
        ) from None
    return ws, wr
