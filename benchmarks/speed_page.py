"""The page and the chart of a run of `ekd-bench`: docs/results/speed.{md,json,svg}, or loading.{md,json} of part l.

ekd-bench --output bench.json experiment=cifar10_limited data.fraction=1.0 --sweep-fraction 0.1
python benchmarks/speed_page.py bench.json --output docs/results
ekd-bench --parts l --folder-images 50000 --output loading.json experiment=cifar10_limited data.fraction=1.0
python benchmarks/speed_page.py loading.json --name loading --output docs/results
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from ekd_lightning import markdown as md

PLAIN, OURS = "#9aa5b1", "#1f6feb"


def rate_rows(rates: dict[str, Any], field: str = "ratio") -> str:
    """Rows of a Markdown table of rates."""
    lines = [
        (name, f"{row['median']:,.0f}", f"{row['min']:,.0f} – {row['max']:,.0f}", f"{row.get(field, row['ratio']):.2f}")
        for name, row in rates.items()
    ]
    return md.table(("", "median", "min – max", "ratio"), lines).strip()


def plain_rows(values: dict[Any, float], head: str) -> str:
    """One row of a Markdown table of numbers."""
    numbers = (f"{value:,.0f}" for value in values.values())
    return md.table((head, *map(str, values)), [("images/s", *numbers)]).strip()


def teachers_section(part: dict[str, Any]) -> str:
    """(b): one table per teacher."""
    parts = []
    for name, row in part["teachers"].items():
        parts.append(f"`{name}`, images/s at batch {part['batch']}:\n\n{rate_rows(row['rates'])}\n")
        parts.append(
            f"{row['format']} against float32 on {row['images']} test images: top-1 agreement "
            f"{100 * row['top1_agreement']:.2f} %, largest difference of a log-probability "
            f"{row['max_log_prob_difference_at_T4']:.3f} at T = 4 ({row['max_log_prob_difference']:.3f} at T = 1). "
            f"The first call, including compilation, took {row['first_call_seconds']:.1f} s.\n"
        )
    return "\n".join(parts)


def inference_section(part: dict[str, Any]) -> str:
    """(e): inference of student and teachers."""
    parts = [
        "Ratios are against the plain float32 ensemble of the three teachers; folded and compiled forms compute in "
        f"{part['format']}.\n"
    ]
    for batch, rows in part["batches"].items():
        over = part["student_over_ensemble_in_the_same_form"][batch]
        ratios = ", ".join(f"{form} {ratio:.1f}" for form, ratio in over.items())
        parts.append(f"Batch {batch}; student against the teacher ensemble in the same form: {ratios} times.\n")
        parts.append(rate_rows(rows) + "\n")
    return "\n".join(parts)


def listed(values: dict[Any, float], unit: str = "") -> str:
    """`0: 1,234, 2: 2,345`."""
    return ", ".join(f"{key}: {value:,.0f}{unit}" for key, value in values.items())


def profile_section(p: dict[str, Any]) -> str:
    """(p): where a training step's time goes."""
    rows = "\n".join(f"| {name} | {100 * share:.1f} % |" for name, share in p["shares"].items())
    return f"""A training epoch with warm tables and three branches, {p["rate"]:,.0f} images/s without the profiler:

| operators | share of their time |
|---|---|
{rows}

If nothing but the convolutions took time, this would be {p["rate_of_the_convolutions_alone"]:,.0f} images/s."""


def epoch_section(c: dict[str, Any]) -> str:
    """(c): a training epoch."""
    return f"""CIFAR-10, {c["images"]:,} training images, {c["epochs"]} epoch(s) per measurement, three branches;
images/s. The plain loop uses its best number of workers, {c["best_workers"]} (images/s by workers:
{listed(c["plain_workers"])}). "Cold" begins with an empty teacher table, "warm" with a full one. Both train through
Lightning with the callbacks and loggers of `ekd-train`, and compile teachers and student as a long run does, with
kernels from torch's cache on disk.

{rate_rows(c["rates"])}"""


def overhead_section(i: dict[str, Any]) -> str:
    """(i): the cost of Lightning."""
    return f"""With the same kernels, tables and student, not compiled, over {i["epochs"]} epochs of part of the data,
Lightning changes the time by {100 * i["overhead"]:+.1f} %.

{rate_rows(i["rates"])}"""


def sweep_section(d: dict[str, Any]) -> str:
    """(d): a sweep."""
    return f"""{d["jobs"]} jobs (teachers 1, 2, 3 × branches 1, 2, 3) of {d["epochs"]} epochs, from an empty store,
take {d["ours"]:,.0f} s without their tests. The plain loop, computed from its measured speed in each job, takes
{d["plain"]:,.0f} s, {d["ratio"]:.1f} times as long. Of our seconds, the students' steps took
{d["students_seconds"]:,.0f}, teachers and tables {d["teachers_seconds"]:,.0f}, and starting, validating and ending
the jobs {d["start_validation_and_end_seconds"]:,.0f}. If the teachers cost nothing, the ratio would be
{d["plain"] / (d["ours"] - d["teachers_seconds"]):.1f}."""


def loader_section(a: dict[str, Any]) -> str:
    """(a): the loaders."""
    return f"""{rate_rows(a["rates"])}

PIL by number of workers, images/s: {listed(a["workers"])}."""


def growth_section(g: dict[str, Any]) -> str:
    """(g): scaling with teachers, branches, batch size and images."""
    heads = {"teachers": "teachers", "branches": "branches", "batch_size": "batch size", "images": "images"}
    tables = "\n\n".join(plain_rows(g[key], head) for key, head in heads.items())
    return f"Training with warm tables, images/s.\n\n{tables}"


def peak_section(h: dict[str, Any]) -> str:
    """(h): share of the machine's peak."""
    shares = "\n".join(f"| {name} | {100 * value:.1f} % |" for name, value in h.items() if isinstance(value, float))
    return f"""Measured peak of a square matrix product, GMAC/s: {listed(h["peak_gmacs"])}. The table gives the share
reached in {h["format"]}, counting a training step as three forward passes:

| work | share of the peak |
|---|---|
{shares}"""


def memory_section(f: dict[str, Any]) -> str:
    """(f): memory."""
    return f"""One epoch of `ekd-train` with these settings peaks at {f["run_gb"]:.2f} GB of resident memory."""


def folder_section(part: dict[str, Any]) -> str:
    """(l): a folder of images."""
    memory = part["memory_gb"]
    rows = [
        (name, f"{row['median']:,.0f}", f"{row['min']:,.0f} – {row['max']:,.0f}", f"{row['ratio']:.2f}", *peak)
        for name, row in part["rates"].items()
        for peak in [(f"{memory[name]:.2f}", f"{part['images'] / row['median']:,.0f}")]
    ]
    heads = ("", "images/s", "min – max", "ratio", "memory, GB", "seconds for all")
    return f"""{part["images"]:,} JPEG files of 320×256 pixels (enlarged CIFAR images), each once, in shuffled batches
of 128 squares of 64 pixels. Every measurement is a process of its own; imports do not count. "Cold cache" decodes all
files into the cache of decoded images first, as the first run with a folder does; "warm cache" reads from it, as every
later run does. The ratio is to torchvision's `ImageFolder` with its best number of workers ({part["best"]}). Memory is
the resident peak, pages of the mapped cache included; that of workers is the largest one's, times their number. The
files themselves lie in the operating system's cache throughout.

{md.table(heads, rows).strip()}"""


SECTIONS = {
    "l": ("Images per second, and memory", folder_section),
    "c": ("A training epoch with three teachers", epoch_section),
    "i": ("Lightning compared with a bare loop", overhead_section),
    "d": ("A sweep", sweep_section),
    "a": ("The loader alone", loader_section),
    "b": ("Each teacher", teachers_section),
    "e": ("Inference", inference_section),
    "g": ("Scaling", growth_section),
    "p": ("Where a training step's time goes", profile_section),
    "h": ("Share of the machine's peak", peak_section),
    "f": ("Memory", memory_section),
}


PLAIN_LOOP = """- **The plain loop** is the usual code with torchvision and a DataLoader: PIL transforms in workers,
  float32, every teacher in every step, with the same loss and the same student.
"""


def page(found: dict[str, Any], name: str, note: str = "") -> str:
    """The page in Markdown, with the parts that were measured."""
    hardware, packages = found["origin"]["hardware"], found["origin"]["packages"]
    picture = f"![rates]({name}.svg)\n\n" if has_chart(found) else ""
    extra = f"- {note}\n" if note else ""
    alone = found.keys() & SECTIONS == {"l"}
    title = "Loading a folder of images" if alone else "Speed compared with a plain PyTorch loop"
    settings = "" if alone else f"- **Settings**: `{found['settings']}`, batch 128, ResNet-8 student.\n"
    extra = ("" if alone else PLAIN_LOOP) + extra
    sections = "\n\n".join(
        f"## {title} ({key})\n\n{write(found[key]).strip()}" for key, (title, write) in SECTIONS.items() if key in found
    )
    return f"""# {title}

Made by `ekd-bench` and `benchmarks/speed_page.py`; all numbers are in [`{name}.json`]({name}.json).

- **Hardware**: {hardware["cpu"]}, {hardware["cpu_count"]} cores ({hardware["cpu_capability"]}),
  {len(hardware["gpus"]) or "no"} GPU; torch {packages["torch"]}, Lightning {packages["pytorch-lightning"]}; commit
  {found["origin"]["git"]["commit"][:7]}.
{settings}- **How**: all variants take turns, {found["rounds"]} counted rounds each. Rates are medians over rounds;
  ratios are medians of the ratios within a round.
{extra}
{picture}{sections}
"""


def has_chart(found: dict[str, Any]) -> bool:
    """Whether all parts of the chart were measured."""
    return all(key in found for key in "bce")


def chart(found: dict[str, Any], path: Path) -> None:
    """Three panels: training, teachers, inference."""
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "ekd", "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 3.6), layout="constrained")
    rates = found["c"]["rates"]
    bars(left, list(rates), [row["median"] for row in rates.values()], [row["ratio"] for row in rates.values()])
    left.set_title("training epoch, three teachers")
    teachers = found["b"]["teachers"]
    names, values, ratios = [], [], []
    for name, row in teachers.items():
        short = next(part for part in name.split("_") if part.startswith(("resnet", "wrn", "densenet")))
        for form in ("float32 eager", "auto folded", "auto folded, compiled"):
            names.append(f"{short}, {form.replace('auto', row['format'])}")
            values.append(row["rates"][form]["median"])
            ratios.append(row["rates"][form]["ratio"])
    bars(middle, names, values, ratios)
    middle.set_title("a teacher alone, batch 128")
    rows = found["e"]["batches"]["128"]
    wanted = [f"{who}, {form}" for who in ("teacher ensemble", "student") for form in ("plain", "folded", "compiled")]
    bars(right, wanted, [rows[w]["median"] for w in wanted], [rows[w]["ratio"] for w in wanted])
    right.set_title("inference, batch 128")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def bars(axes: Any, names: list[str], values: list[float], ratios: list[float]) -> None:
    """Horizontal bars with their rate and ratio; the first of a group is grey."""
    colors = [
        PLAIN if abs(ratio - 1) < 1e-9 or "plain" in name else OURS for name, ratio in zip(names, ratios, strict=True)
    ]
    positions = range(len(names))[::-1]
    axes.barh(positions, values, color=colors)
    for position, value, ratio in zip(positions, values, ratios, strict=True):
        axes.text(value, position, f" {value:,.0f}  ({ratio:.1f}×)", va="center", fontsize=8)
    axes.set_yticks(positions, names)
    axes.set_xlim(0, max(values) * 1.6)
    axes.set_xlabel("images/s (ratio to grey)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="of one machine and one commit; their parts are merged")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--name", default="speed", help="name of the files")
    parser.add_argument("--note", default="", help="one more line about the measurement")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for file in args.files:
        found |= json.loads(file.read_text())
    for private in ("command", "working_directory"):  # paths of the machine
        found["origin"].pop(private, None)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{args.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.output / f"{args.name}.md").write_text(page(found, args.name, args.note))
    if has_chart(found):
        chart(found, args.output / f"{args.name}.svg")


if __name__ == "__main__":
    main()
