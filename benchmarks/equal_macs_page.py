"""The page of a small search for a setting in which EKD is better at equal MACs: docs/results/equal_macs_*.{md,json}.

    ekd-train experiment=cifar10_limited data.val_fraction=0.5 hydra.run.dir=search/<name> ...    the trials
    ekd-compare --methods ekd,kd_mean@resnet14,... --tuned ... --no-controls --output compare/5pct ...
    python benchmarks/equal_macs_page.py compare/5pct docs/results/equal_macs_cifar10_5pct.md --trials search

The trials may also be those of ekd-tune, one file per row:

    ekd-tune --output tuned method=ekd method.name=ekd@resnet14 ... data.fraction=0.06 data.val_fraction=0.8333
    python benchmarks/equal_macs_page.py compare/1pct docs/results/equal_macs_cifar10_1pct.md --tuned tuned

or, to confirm them, the later trials of an earlier page, and more of the kind:

    python benchmarks/equal_macs_page.py compare/5pct_maps docs/results/equal_macs_cifar10_5pct_maps.md \
        --trials docs/results/equal_macs_cifar10_5pct.json search --later later

--later are trials that had no part in the choice of what was confirmed.

The trials' test figures are not read. What stands in an existing page between the two marks `<!-- notes -->` was
written by hand, and is kept.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from page_parts import NOTES, bullets, difference, kept_notes, read_study_runs, setup, side

from ekd_lightning import markdown as md
from ekd_lightning.reporting.blocks import Block
from ekd_lightning.reporting.estimates import interval_text, percent
from ekd_lightning.reporting.tables import Row
from ekd_lightning.runs.collection import collect
from ekd_lightning.runs.directory import RunDirectory
from ekd_lightning.studies.comparison import records, study_block, study_rows
from ekd_lightning.studies.tuned import other_budget, standard_error


def weights(result: Mapping[str, Any]) -> str:
    """The temperature and the terms' weights of a run."""
    found = {key.removeprefix("weight_"): value for key, value in result.items() if key.startswith("weight_")}
    return f"T {result['temperature']:g}; " + ", ".join(f"{key} {value:g}" for key, value in found.items())


def trials(folder: Path, usual: set[str]) -> list[dict[str, Any]]:
    """What each trial was, and its accuracy on validation images; of an earlier page's .json, its later ones.

    Teachers are named if they are not the usual ones.
    """
    if folder.suffix == ".json":
        return list(json.loads(folder.read_text())["later_trials"])
    found = []
    for run in collect([folder]).runs:
        result, words = run.result or {}, RunDirectory(run.directory).overrides()
        # All weights are listed, because defaults change.
        own = [
            word.split("feature_branch.")[-1]
            for word in words
            if word.startswith("recipe.lr") or word.endswith(("=last", "=conv_reg"))
        ]
        if any(word.endswith("reduction=sum") for word in words):
            own.append("summed over branches")
        taught = [t["id"] for t in result["teachers"]]
        if not set(taught) <= usual:
            own.append(f"taught by {', '.join(name.removeprefix('cifar10_') for name in taught)}")
        branches, split = result["num_branches"], result.get("split_after")
        shape = f"K {branches}" + (f" after {split}" if branches > 1 and split else "")
        width = (run.setting("student.options") or {}).get("width", 1)
        network = run.setting("student.network") + (f" of width {width:g}" if width != 1 else "")
        found.append(
            {
                "method": result["method"],
                "student": f"{network}, {shape}",
                "macs": result["macs"],
                "settings": "; ".join([weights(result), *(w for w in own if w != "recipe.lr=0.05")]),
                "val_accuracy": result["val_accuracy"],
                "seed": result["seed"],
                "train": result["num_train_images"],
                "val": result["num_val_images"],
            }
        )
    return found


def ranked(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trials by method and student, the best first."""
    return sorted(found, key=lambda t: (t["method"], t["student"], -t["val_accuracy"]))


def trial_table(found: list[dict[str, Any]]) -> str:
    """One line per trial, the best of each method first."""
    lines = [
        (
            md.code(t["method"]),
            t["student"],
            f"{t['macs'] / 1e6:.1f} M",
            t["settings"],
            f"{100 * t['val_accuracy']:.2f}",
        )
        for t in found
    ]
    return md.table(("method", "student", "MACs", "settings", "validation accuracy %"), lines)


def outcome(rows: Sequence[Row]) -> str:
    """The rows, and every pair of them."""
    lines = []
    for group in (row.group for row in rows):
        first, found = group.done[0].result or {}, group.scalars()
        lines.append(
            (
                md.code(group.label),
                weights(first),
                f"{first['num_parameters']:,}",
                f"{first['macs'] / 1e6:.1f} M",
                percent(group.accuracy),
                f"{100 * found['test_mean_branch_accuracy'].mean:.2f}",
                f"{found['test_nll'].mean:.3f}",
                group.n,
            )
        )
    heads = ("row", "settings", "parameters", "MACs", "test accuracy %", "mean branch", "NLL", "n")
    pairs = [
        (md.Markdown(f"`{one.group.label}` − `{other.group.label}`"), interval_text(minus), side(minus))
        for one, other in combinations(rows, 2)
        for minus in [difference(one, other)]
    ]
    compared = md.table(("difference, paired by seed", "points with 95 % interval", ""), pairs)
    return f"{md.table(heads, lines)}\n{compared}"


def tuned(folder: Path) -> list[dict[str, Any]]:
    """What `ekd-tune` found for each row.

    Raises:
        ValueError: If rows had other budgets, images or epochs, or a search is not at its end.
    """
    found = [{"row": path.stem, **yaml.safe_load(path.read_text())} for path in sorted(folder.glob("*.yaml"))]
    if not found:
        raise ValueError(f"{folder}: no result of ekd-tune")
    for t in found:
        if t["trials"] != t["budget"]:
            raise ValueError(f"{t['row']}: {t['trials']} of {t['budget']} trials")
        for key in other_budget(t, found[0]):
            raise ValueError(f"{t['row']} and {found[0]['row']} were searched with other {key}")
    return found


def tuned_table(found: list[dict[str, Any]]) -> str:
    """One line per row: its budget, its default and its best trial."""
    heads = ("row", "trials", "pruned", "diverged", "searched", "best", "validation accuracy %", "of the default %")
    lines = []
    for t in found:
        default = "–" if t["default_value"] is None else f"{100 * t['default_value']:.2f}"
        searched = "; ".join(f"{short(key)} {said(values)}" for key, values in t["space"].items())
        best = ", ".join(map(short, t["overrides"])) or "the default"
        counts = (t["trials"], t["pruned"], t["diverged"])
        lines.append((md.code(t["row"]), *counts, searched, best, f"{100 * t['value']:.2f}", default))
    return md.table(heads, lines)


def short(key: str) -> str:
    """A setting without the words that all share."""
    return key.lstrip("+").removeprefix("method.").removeprefix("terms.")


def said(values: dict[str, Any]) -> str:
    """A range or choices, for people."""
    if "choices" in values:
        return "/".join(map(str, values["choices"]))
    return f"{values['low']:g} to {values['high']:g}"


def search_facts(found: list[dict[str, Any]], tuning: list[dict[str, Any]]) -> tuple[str, ...]:
    """How the settings were chosen."""
    said = (
        "**Confirmation**: the best setting of each method on fewer images and over seeds; each run reads the test set "
        "once, at its end.",
    )
    if tuning:
        first = tuning[0]
        protocol, seeds = first["protocol"], ", ".join(map(str, first["seeds"]))
        images = f"{first['validation_images']:,} validation images"
        error = 100 * first["standard_error"]
        return (
            f"**Search** by `ekd-tune`: seed {seeds}, {protocol['epochs']} epochs, {images}; the same number of trials "
            f"for every method, the first of which is the default. The standard error of one accuracy is about "
            f"{error:.1f} points, so closer settings cannot be distinguished, and the best of several looks better "
            "than it is.",
            *said,
        )
    counts = Counter(f"{t['method']} ({t['student']})" for t in found)
    mean = sum(t["val_accuracy"] for t in found) / len(found)
    first, error = found[0], 100 * standard_error(mean, found[0]["val"])
    counted = ", ".join(f"{n} {key}" for key, n in counts.items())
    return (
        f"**Search**: seed {first['seed']}, {first['train']:,} training and {first['val']:,} validation "
        f"images; trials: {counted}. The standard error of one accuracy is about {error:.1f} points, so "
        "closer settings cannot be distinguished, and the best of several looks better than it is.",
        *said,
    )


def page(block: Block, facts: tuple[str, ...], tables: str, notes: str) -> str:
    """The whole page."""
    rows = [row for row in study_rows(block) if row.group.n]
    return f"""# EKD at equal MACs with {100 * block.fraction:g} % of the labels of {block.data}

Made by `benchmarks/equal_macs_page.py`. The question: with little data, is there a setting in which EKD beats plain
distillation into a student of the same MACs? Each row has the best of the settings that were tried for its method and
network, chosen on validation images, and the choice is confirmed on the test set over seeds. Rows named `*_macs` use
the plain ResNet with the MACs closest to EKD's, and the settings of the other row of their method.

{bullets(facts)}

## Confirmation

{setup(block.data, rows, "those of the best trials, see the table")}

{outcome(rows)}

{NOTES}
{notes.strip()}
{NOTES}

{tables}"""


def later_section(later: list[dict[str, Any]]) -> str:
    """The table of trials that nothing was chosen from; empty without."""
    if not later:
        return ""
    return f"""
## Further trials

With the same schedule; they had no part in the choice of what is confirmed above.

{trial_table(later)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="--output of ekd-compare")
    parser.add_argument("page", type=Path)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--trials", type=Path, nargs="+", help="folders of trials, or an earlier page's .json")
    given.add_argument("--tuned", type=Path, help="--output of ekd-tune")
    parser.add_argument("--later", type=Path, help="folder of further trials")
    args = parser.parse_args()
    data, fraction, runs = read_study_runs(parser, args.study)
    block = study_block(data, fraction, runs)
    try:
        tuning = tuned(args.tuned) if args.tuned else []
    except ValueError as error:
        parser.error(str(error))
    usual = {t["id"] for group in block.groups for run in group.done for t in run.get("teachers")}
    found = ranked(trial for place in args.trials or () for trial in trials(place, usual))
    if args.trials and not found:
        parser.error("no trials")
    later = ranked(trials(args.later, usual)) if args.later else []
    first = f"## Search\n\n{tuned_table(tuning)}\n" if tuning else f"## Trials\n\n{trial_table(found)}\n"
    args.page.write_text(page(block, search_facts(found, tuning), first + later_section(later), kept_notes(args.page)))
    kept = {"trials": found or tuning, "later_trials": later, "confirmation": records(block, study_rows(block), runs)}
    args.page.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
