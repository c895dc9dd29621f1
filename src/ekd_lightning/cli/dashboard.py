"""`ekd-dashboard`: saves a workspace, or a report, in a project of Weights & Biases."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from typing import Any

from ekd_lightning.config.commands import print_next
from ekd_lightning.config.edge import make_parser, run_command
from ekd_lightning.config.overrides import override, shell_word
from ekd_lightning.errors import UserError
from ekd_lightning.progress import part, phase, session

PROGRAM = "ekd-dashboard"
EXAMPLES = """\
examples:
  ekd-dashboard --entity me                                    a workspace for the project ekd-lightning
  ekd-dashboard --entity me --project c10 --group 2026-01-31/12-00-00      one sweep of it
  ekd-dashboard --entity me --report                           a report with the same panels, as a draft
  ekd-dashboard --entity me --dry-run                          what would be saved; needs no network

Runs are uploaded with logger=wandb, offline runs by `make wandb-sync`. See docs/dashboards.md.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `ekd-dashboard`; exit code 2 for a user's mistake."""
    what = "Save a workspace, or a report, with panels for distillation runs in a W&B project."
    parser = make_parser(PROGRAM, what, EXAMPLES)
    parser.add_argument("--entity", default=os.environ.get("WANDB_ENTITY", ""), help="user or team (or WANDB_ENTITY)")
    project = os.environ.get("WANDB_PROJECT") or "ekd-lightning"
    parser.add_argument("--project", default=project, help="default: WANDB_PROJECT, else ekd-lightning")
    parser.add_argument("--group", help="only runs of this sweep, as W&B shows its group")
    parser.add_argument("--name", default="Ensemble distillation", help="title of the view")
    parser.add_argument("--report", action="store_true", help="a report instead of a workspace")
    parser.add_argument("--dry-run", action="store_true", help="send nothing, print what would be saved")
    run_command(parser, run_dashboard, argv, level=logging.WARNING)


def run_dashboard(args: argparse.Namespace) -> None:
    """Builds the view and saves it, or with `--dry-run` prints what it would contain.

    Raises:
        UserError: For an impossible name, a missing package or login, or if W&B refuses.
    """
    for option in ("entity", "project", "name", "group"):
        if (value := getattr(args, option)) is not None and not value.strip():
            hint = "; give your W&B user or team, or set WANDB_ENTITY" if option == "entity" else ""
            raise UserError(f"--{option}: must not be empty{hint}")
        if option in ("entity", "project") and "/" in value:
            raise UserError(f"--{option} {value}: must not contain a slash")
    kind = "report" if args.report else "workspace"
    with session(kind, keep=False), phase(kind):
        with part("importing wandb"):
            from ekd_lightning.reporting import wandb_views  # noqa: PLC0415 (slow; --help needs none)

            build = wandb_views.build_report if args.report else wandb_views.build_workspace
            view = build(args.entity, args.project, args.name, args.group)
        if not args.dry_run:
            with part("saving it on the server"):
                address = save(view, f"{args.entity}/{args.project}")
    if args.dry_run:
        print(f"{kind} {args.name!r} for {args.entity}/{args.project}, not sent:")
        for title, panels in wandb_views.panel_sections().items():
            print(f"  {title}: {len(panels)} panels")
        print_next(_command(args, report=args.report))
        return
    print(address)
    places = {"entity": args.entity, "project": args.project} | ({"group": args.group} if args.group else {})
    words = [shell_word(override(f"logger.wandb.{key}", value)) for key, value in places.items()]
    other = [] if args.report else [_command(args, report=True)]
    print_next(" ".join(["ekd-train logger=wandb", *words]), *other)


def _command(args: argparse.Namespace, *, report: bool) -> str:
    """The command that saves the same view, or the report with its panels."""
    given = {name: getattr(args, name) for name in ("entity", "project", "group", "name")}
    words = [f"--{name} {shell_word(value)}" for name, value in given.items() if value is not None]
    return " ".join([PROGRAM, *words, *(["--report"] if report else [])])


def save(view: Any, place: str) -> str:
    """Sends a workspace or a report to W&B, as nothing else in the package does, and returns its address.

    Messages name the place, `entity/project`.

    Raises:
        UserError: Without a login, without a network, or if W&B refuses.
    """
    try:
        view.save()
    except Exception as error:  # without a login the package raises a bare Exception, else errors of many kinds
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{place}: W&B did not save the view: {text}") from None
    return str(view.url)


if __name__ == "__main__":
    main()
