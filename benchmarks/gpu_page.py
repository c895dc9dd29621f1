"""Table and page of the measurements of benchmarks/gpu.py; missing ones are marked as unmeasured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

UNMEASURED = "unmeasured"
STEPS = {
    "plain loop (float32, PIL in workers)": ("plain", "images_per_second"),
    "careful plain loop (channels-last, bfloat16, torch.compile)": ("careful", "images_per_second"),
    "careful plain loop, `reduce-overhead`": ("careful, reduce-overhead", "images_per_second"),
    "ours, eager step, cold table": ("ours, eager", "cold", "images_per_second"),
    "ours, eager step, warm table": ("ours, eager", "warm", "images_per_second"),
    "ours, captured step, cold table": ("ours, captured", "cold", "images_per_second"),
    "ours, captured step, warm table": ("ours, captured", "warm", "images_per_second"),
    "ours, captured and compiled, warm table": ("ours, captured and compiled", "warm", "images_per_second"),
    "bare graph loop, without Lightning": ("graph", "captured", "images_per_second"),
    "bare graph loop, compiled": ("graph", "captured and compiled", "images_per_second"),
}
"""Row -> path of its images per second."""
STARTS = {
    "plain loop, until the first step": ("plain", "seconds_to_first_step"),
    "careful plain loop, until the first step": ("careful", "seconds_to_first_step"),
    "careful plain loop, `reduce-overhead`, until the first step": (
        "careful, reduce-overhead",
        "seconds_to_first_step",
    ),
    "ours, captured, until the first step": ("ours, captured", "warm", "seconds_to_first_step"),
    "ours, captured and compiled, until the first step": (
        "ours, captured and compiled",
        "warm",
        "seconds_to_first_step",
    ),
    "`ekd-train` with cold caches, until the first step": ("command", "cold", "seconds_to_first_step"),
    "`ekd-train` with warm caches, until the first step": ("command", "warm", "seconds_to_first_step"),
    "of which imports": ("imports", "seconds"),
    "`ekd-train`, first run of a store, after the last step": ("command", "cold", "seconds_after_last_step"),
    "`ekd-train`, later runs, after the last step": ("command", "warm", "seconds_after_last_step"),
}
"""Row -> path of its seconds."""
MANY = {
    "processes": "many",
    "processes with MPS": "many, MPS",
    "students in one process, a CUDA stream each, without Lightning": "streams",
}
"""Row -> its part."""
SECTIONS = {
    **{f"maps, {method}": f"maps under `method={method}`" for method in ("ekd", "camkd", "fitnet")},
    "command": "`ekd-train` as a command",
    "imports": "the time of imports",
    **{part: f"{row} at once" for row, part in MANY.items()},
}
"""Part -> its name in the page."""


def merged(files: list[dict[str, Any]]) -> dict[str, Any]:
    """The measurements of the first file; later files fill the parts that it lacks, and say where they were made."""
    first, *later = files
    parts, also = dict(first["parts"]), list(first.get("also", []))
    for other in later:
        found = {name: part for name, part in other["parts"].items() if part.get("result")}
        new = {name: part for name, part in found.items() if not parts.get(name, {}).get("result")}
        parts |= new
        # The later file may have filled its own gaps from others.
        filled = {name: one["origin"] for one in other.get("also", []) for name in one["parts"]}
        origins = {name: filled.get(name, other["origin"]) for name in new}
        for origin in [one for n, one in enumerate(origins.values()) if one not in [*origins.values()][:n]]:
            also.append({"origin": origin, "parts": [name for name in new if origins[name] == origin]})
    return {**first, "parts": parts, "also": also}


def value(found: dict[str, Any], *path: str) -> Any:
    """The result of a part; None if it has none."""
    node: Any = found["parts"].get(path[0], {}).get("result", {})
    for key in path[1:]:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def number(given: float | None, form: str = ",.0f", unit: str = "") -> str:
    """A number with its unit; `UNMEASURED` for None."""
    return UNMEASURED if given is None else format(given, form) + unit


def ratio(one: float | None, other: float | None) -> str:
    """One number divided by another."""
    return UNMEASURED if one is None or not other else f"{one / other:.2f}"


def percent(share: float | None) -> str:
    """A share of one in percent."""
    return UNMEASURED if share is None else f"{100 * share:.1f} %"


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def steps(found: dict[str, Any]) -> str:
    """Images per second of each variant, compared with both plain loops."""
    plain, careful = (value(found, part, "images_per_second") for part in ("plain", "careful"))
    rows = []
    for name, path in STEPS.items():
        rate = value(found, *path)
        rows.append([name, number(rate), ratio(rate, plain), ratio(rate, careful)])
    return markdown(["", "images/s", "× plain", "× careful"], rows)


def around(found: dict[str, Any]) -> str:
    """Time outside the step: start, end, between epochs, and Lightning's share."""
    rows = [[name, number(value(found, *path), ".1f", " s")] for name, path in STARTS.items()]
    between = value(found, "ours, captured", "warm", "seconds_between_epochs")
    middle = 1000 * statistics.median(between) if between else None
    rows.append(["between two epochs, without the validation", number(middle, ",.0f", " ms")])
    bare, whole = (
        value(found, *STEPS[f]) for f in ("bare graph loop, without Lightning", "ours, captured step, warm table")
    )
    over = 100 * (bare / whole - 1) if bare and whole else None
    rows.append(["extra time of Lightning over the bare graph loop, captured step", number(over, ".1f", " %")])
    return markdown(["", "time"], rows)


def maps(found: dict[str, Any]) -> str:
    """Methods that compare maps of all teachers in every step."""
    rows = []
    for method in ("ekd", "camkd", "fitnet"):
        ours = value(found, f"maps, {method}", "ours", "images_per_second")
        plain = value(found, f"maps, {method}", "plain", "images_per_second")
        rows.append([f"`method={method}`", number(plain), number(ours), ratio(ours, plain)])
    return markdown(["", "plain loop, images/s", "ours, images/s", "ratio"], rows)


def many(found: dict[str, Any]) -> str:
    """Several runs at once."""
    counts = (1, 2, 4, 8)
    rows = []
    for name, part in MANY.items():
        runs = value(found, part, "runs") or {}
        rates = [(runs.get(str(n)) or runs.get(n) or {}).get("images_per_second") for n in counts]
        rows.append([name, *(number(rate) for rate in rates)])
    return markdown(["runs at once", *map(str, counts)], rows)


def profile(found: dict[str, Any]) -> str:
    """Shares of the GPU's time in a captured step."""
    forms = ("captured", "captured and compiled")
    shares = {form: value(found, "graph", form, "profile", "shares") or {} for form in forms}
    names = list(dict.fromkeys(name for form in forms for name in shares[form])) or ["all kernels"]
    percent = [
        [name, *(f"{100 * shares[f][name]:.1f} %" if name in shares[f] else UNMEASURED for f in forms)]
        for name in names
    ]
    return markdown(["kernels", *forms], percent)


def teachers(found: dict[str, Any]) -> str:
    """Rates of the teachers alone."""
    rates = value(found, "teachers", "images_per_second") or {}
    rows = [[f"`{name}`", number(rate)] for name, rate in rates.items()] or [["all teachers", UNMEASURED]]
    if rates:
        rows.append(["one after another", number(1 / sum(1 / rate for rate in rates.values()))])
    return markdown(["", "images/s"], rows)


def failures(found: dict[str, Any]) -> list[str]:
    """Failed parts with their errors."""
    return [f"{name}: {part['error']}" for name, part in found["parts"].items() if "error" in part]


def table(found: dict[str, Any]) -> str:
    """The short table for a terminal."""
    parts = [steps(found), around(found), maps(found), many(found)]
    seconds = ", ".join(f"{name} {part.get('seconds', 0):.0f}" for name, part in found["parts"].items())
    ends = [f"seconds: {seconds}; {found.get('seconds', 0):.0f} in all", *failures(found)]
    return "\n\n".join([*parts, "\n".join(ends)])


def _commit(origin: dict[str, Any]) -> str:
    return str((origin.get("git") or {}).get("commit") or "unknown")[:10]


def _added(one: dict[str, Any]) -> str:
    """Says which parts were measured in another run of the script."""
    gpus = ", ".join(one["origin"]["hardware"]["gpus"]) or "no GPU"
    names = dict.fromkeys(SECTIONS.get(part, part) for part in one["parts"])
    return f"Measured in another run of the script, on {gpus}, commit {_commit(one['origin'])}:\n{'; '.join(names)}."


def page(found: dict[str, Any]) -> str:
    """The page for the docs."""
    origin = found["origin"]
    hardware, packages = origin["hardware"], origin["packages"]
    gpus = ", ".join(hardware["gpus"]) or "no GPU: a trial on a processor, whose numbers mean nothing"
    commit = _commit(origin)
    workers = value(found, "plain", "workers")
    failed = failures(found)
    planned = ""
    if "planned_epochs" in found:
        planned = f"""
Our runs are planned for {found["planned_epochs"]} epochs, so that they hold all teacher rows on the device, and end
after two or three."""
    added = "".join(f"\n{_added(one)}" for one in found.get("also", []))
    problems = "\n## What failed\n\n" + "\n".join(f"- {line}" for line in failed) + "\n" if failed else ""
    return f"""# Speed on a GPU

Made by `benchmarks/gpu.py`; all numbers are in [speed_gpu.json](speed_gpu.json). {gpus}, {hardware["cpu_count"]}
cores of {hardware["cpu"]}, torch {packages["torch"]}, pytorch-lightning {packages["pytorch-lightning"]}, commit
{commit}. Rows without a measurement say "{UNMEASURED}"; nothing is estimated.{added}

CIFAR-10, teachers ResNet-20, -32 and -56, student ResNet-8 with three branches, method `ekd_pooled`, batch 128:
`{" ".join(found["settings"])}`.
Rates are medians over the epochs after the first, which warms up, compiles and captures.{planned}

## A training step

{steps(found)}

The plain loop is the usual code without this package: PIL transforms in loader workers ({number(workers)} was the
fastest number tried, up to one per core), float32, every teacher in every step. The careful one adds channels-last,
autocast to bfloat16, `torch.compile` and pinned batches, with one worker per core. Ours trains through Lightning as
`ekd-train` does. With a cold table the teachers compute every row; a warm table holds all rows. A captured step is one
CUDA graph.

## Outside the step

{around(found)}

Loops start from loaded images. The variants compile at the same time, so these seconds are upper bounds.

## Teachers

{teachers(found)}

Each teacher computes rows ahead of an epoch, {number(value(found, "teachers", "chunk"))} images at once, in
{value(found, "teachers", "format") or UNMEASURED}, not compiled. A cold table is at most
as fast as all of them in turn.

## Maps of three teachers in every step

{maps(found)}

## Several runs at once

Images per second of all runs together, with a warm table; processes also validate and write checkpoints. They take
turns on the GPU; NVIDIA's multi-process service (MPS) lets their kernels run side by side. `hydra/launcher=shared_gpu`
starts eight runs with it ([launchers](../sweeps.md#launchers)).

{many(found)}

## Where a captured step's time goes

{profile(found)}
{problems}"""


def write(folder: Path, found: dict[str, Any]) -> None:
    """Writes the page and its JSON into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed_gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "speed_gpu.md").write_text(page(found))
