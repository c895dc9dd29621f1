# %% [markdown]
# # A finished study
#
# Which method is best at which cost? This notebook reads the records of a study of `ekd-compare`: 44 rows on 10 %
# of CIFAR-10's labels, three to five seeds each, with the default weights of every method. It trains nothing. For a
# study of your own, use `collect([folder])` in place of the records; `ekd-report` makes a page of the same numbers.

# %%
from pathlib import Path

import matplotlib.pyplot as plt

import ekd_lightning
from ekd_lightning.reporting.blocks import blocks
from ekd_lightning.reporting.estimates import interval_text, minus
from ekd_lightning.reporting.groups import group
from ekd_lightning.runs.collection import Collection, read_records

plt.rcParams.update({"figure.dpi": 80, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False})

REPOSITORY = Path(ekd_lightning.__file__).resolve().parents[2]
STUDIES = ("methods", "methods with maps")  # the second one adds rows under the same protocol
runs = [run for run in read_records(REPOSITORY / "docs/results/study/cifar10.jsonl") if run.study in STUDIES]
(block,) = blocks(group(Collection(REPOSITORY, tuple(runs))))
rows = {row.label: row for row in block.groups}
print(f"{block.title}: {len(rows)} rows, {block.protocol.steps:,} steps")
print("A run has:", ", ".join(sorted(runs[0].result)))

# %% [markdown]
# ## The ten most accurate rows
#
# Mean and sample standard deviation of the test accuracy over the seeds. Rows whose name ends in `_macs` or
# `_parameters` are plain students that cost as much as the branched student of `ekd_pooled`, EKD with early branches.

# %%
ranked = sorted(rows.values(), key=lambda row: -row.accuracy.mean)
print(f"{'row':30s}{'accuracy %':>16s}{'MACs':>10s}{'branches':>10s}")
for row in ranked[:10]:
    accuracy = f"{100 * row.accuracy.mean:.2f} ± {100 * row.accuracy.std:.2f}"
    print(f"{row.label:30s}{accuracy:>16s}{row.mean('macs') / 1e6:>8.1f} M{row.num_branches:>10d}")

# %% [markdown]
# ## Accuracy against cost
#
# A row is worth its cost if no other one lies above it and to its left.

# %%
NAMED = ("ce", "kd_mean", "camkd", "camkd_maps", "ekd", "ekd_pooled", "kd_mean_macs", "ce@resnet20", "dml")
figure, axis = plt.subplots(figsize=(8, 4.6))
for row in rows.values():
    branched, place = row.num_branches > 1, (row.mean("macs") / 1e6, 100 * row.accuracy.mean)
    colour = "tab:blue" if row.label.startswith("ekd") else "tab:green" if branched else "tab:gray"
    axis.scatter(*place, marker="D" if branched else "o", color=colour, alpha=0.8)
    if row.label in NAMED:
        left = row.label == "kd_mean_macs"  # its neighbour ekd_pooled is on the right
        shift = {"xytext": (-6, -4), "ha": "right"} if left else {"xytext": (6, 3)}
        axis.annotate(row.label, place, textcoords="offset points", size=9, **shift)
axis.set_xlabel("million multiply-accumulates per image")
axis.set_ylabel("test accuracy, %")
axis.set_title("Blue: EKD and its variants. Green: other branched students. Gray: plain students.", size=10)
axis.grid(alpha=0.3)
figure.tight_layout()
plt.show()

front, best = [], 0.0
for row in sorted(rows.values(), key=lambda row: (row.mean("macs"), -row.accuracy.mean)):
    if row.accuracy.mean > best:
        front, best = [*front, row.label], row.accuracy.mean
print("Rows that are more accurate than every cheaper one:", ", ".join(front))

# %% [markdown]
# ## EKD and its controls
#
# Two rows at one seed saw the same images in the same order, so differences are paired by seed, and smaller than the
# spread of either row. An interval that contains 0 shows no difference.

# %%
CONTROLS = {
    "ce": "the plain student, labels alone",
    "kd_mean": "plain distillation, the same network",
    "camkd": "CA-MKD, which compares the last maps",
    "camkd_maps": "CA-MKD with maps of every stage",
    "kd_mean_maps": "plain distillation with the same maps",
    "kd_mean_macs": "plain distillation, twice the MACs",
    "ekd_gradient_mean": "EKD whose heads get 1/K of the gradient",
    "ekd_pooled": "EKD with early branches, twice the MACs",
}
ours = rows["ekd"].by_seed("test_accuracy")
differences = {name: minus(ours, rows[name].by_seed("test_accuracy")) for name in CONTROLS}

figure, axis = plt.subplots(figsize=(8, 4))
for place, found in enumerate(differences.values()):
    axis.errorbar(100 * found.mean, place, xerr=100 * found.half, fmt="o", color="tab:blue", capsize=3)
axis.axvline(0, color="black", linewidth=0.8)
axis.set_yticks(range(len(CONTROLS)), [f"{what} ({name})" for name, what in CONTROLS.items()])
axis.invert_yaxis()
axis.set_xlabel("EKD minus the control, points of test accuracy (95 % interval)")
axis.grid(axis="x", alpha=0.3)
figure.tight_layout()
plt.show()

for name, found in differences.items():
    verdict = "level" if abs(found.mean) <= found.half else "EKD is better" if found.mean > 0 else "EKD is worse"
    print(f"{name:22s}{interval_text(found):26s}{verdict}")

# %% [markdown]
# ## What to conclude
#
# - EKD is better than every method that compares no maps of every stage, at the cost of a plain ResNet-8: that is what
#   it imitates.
# - Plain distillation and CA-MKD with the same maps are level with EKD: in the test accuracy, five seeds show no gain
#   from the branches, which are heads with a teacher each.
# - The gradient of the heads matters: with 1/K of a plain student's (`ekd_gradient_mean`) EKD is worse.
# - Early branches with pooled features cost twice as much and are worse.
#
# All of it holds for one data set, one family of networks, 20 epochs and default weights. The
# [page of the study](../docs/results/study/cifar10.md) has the other rows and what was checked.
