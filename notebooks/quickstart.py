# %% [markdown]
# # Quickstart: what the branches learn
#
# This notebook trains three small teachers on a part of scikit-learn's handwritten digits, distils them into one
# student with a shared trunk and three branches, and compares the branches. Branch *k* imitates teacher *k*. In the
# control, every branch of the same student imitates the *mean* of the teachers. Everything runs on a CPU in a minute
# or two.
#
# One seed and 360 test images show how the parts work. They are too few to rank methods.

# %%
import csv
import logging
import os
import warnings
from dataclasses import asdict
from importlib import resources
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import yaml

from ekd_lightning.methods import make_assignment
from ekd_lightning.networks import load_student
from ekd_lightning.pipeline.prepare import prepare
from ekd_lightning.pipeline.run import run
from ekd_lightning.settings import (
    DataSettings,
    MethodSettings,
    RecipeSettings,
    Settings,
    StudentSettings,
    TeacherSettings,
)
from ekd_lightning.training.pool import gather_teachers

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning")
plt.rcParams.update({"figure.dpi": 100, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False})

FAST = os.environ.get("EKD_NOTEBOOK_FAST") == "1"  # one epoch of everything: a check that the cells run
OUT = Path("quickstart")

# %% [markdown]
# ## Settings
#
# `Settings` is the typed form of the command line of `ekd-train`. Method and data set come from the configuration
# files of the package; everything else is chosen to be small.


# %%
def shipped(name: str) -> dict:
    """A file of the package's configuration."""
    return yaml.safe_load(resources.files("ekd_lightning.conf").joinpath(name).read_text())


def recipe(epochs: int) -> RecipeSettings:
    return RecipeSettings(epochs=1 if FAST else epochs, batch_size=16, lr=0.05)


def make_settings(assignment: str) -> Settings:
    student = recipe(6)
    return Settings(
        data=DataSettings(**shipped("data/digits.yaml"), fraction=0.15 if FAST else 0.4),
        teachers=TeacherSettings(
            pool=[{"train": "resnet8", "seed": 0}, {"train": "resnet14", "seed": 1}, {"train": "wrn_16_1", "seed": 2}],
            recipe=recipe(5),
            store=str(OUT / "store"),
        ),
        student=StudentSettings(network="resnet8", branches=3, split_after="stage1"),
        method=MethodSettings(**{**shipped("method/ekd_pooled.yaml")["method"], "assignment": assignment}),
        recipe=student,
        trainer={
            "accelerator": "cpu",
            "precision": "32-true",
            "max_epochs": student.epochs,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        },
    )


ASSIGNMENTS = ("one_to_one", "mean")
LABELS = {"one_to_one": "EKD (one to one)", "mean": "control (mean teacher)"}
settings = {name: make_settings(name) for name in ASSIGNMENTS}
for name in ASSIGNMENTS:
    print(f"{name}: row k says whose output branch k imitates")
    print(make_assignment(name, 3, 3))

# %% [markdown]
# ## The images and their views
#
# `prepare` builds and checks data, subset, views, student and method. Augmentation is a finite family of numbered
# views of each image. `(image, view)` therefore identifies an input, and teacher outputs for it can be stored.

# %%
prepared = prepare(settings["one_to_one"], "cpu")
dataset, views = prepared.dataset, prepared.views
shown = prepared.subset.train_index[:4]
numbers = [views.identity_view, *torch.linspace(0, views.num_views - 1, 6).round().int().tolist()]

figure, axes = plt.subplots(len(shown), len(numbers), figsize=(8.4, 5.2))
for row, index in zip(axes, shown, strict=True):
    for column, (axis, view) in enumerate(zip(row, numbers, strict=True)):
        image = views(dataset.train.images[index][None], torch.tensor([view]), index[None])[0]
        axis.imshow(image.permute(1, 2, 0))
        axis.set_xticks([])
        axis.set_yticks([])
        if axis in axes[0]:
            axis.set_title("as it is" if column == 0 else f"view {view}")
    row[0].set_ylabel(f"label {int(dataset.train.labels[index])}")
figure.tight_layout()
plt.show()

train, val = prepared.subset.train_index, prepared.subset.val_index
print(
    f"{len(train)} images to train on and {len(val)} to validate on, of {len(dataset.train)}; "
    f"{views.num_views} views of each, so at most {views.num_views * len(train):,} different inputs."
)

# %% [markdown]
# ## The teachers
#
# The teachers are trained on demand on the student's subset and kept in a store; a second call loads them.

# %%
teachers = gather_teachers(prepared.teachers)
teacher_names = [identity.id for identity in teachers.identities]
images, labels = dataset.test.images.float() / 255, dataset.test.labels
teacher_logits = teachers(images).logits  # [M, B, C]
teacher_hits = teacher_logits.argmax(-1) == labels
differ = (teacher_logits.argmax(-1) != teacher_logits.argmax(-1)[0]).any(0)

for name, hits in zip(teacher_names, teacher_hits, strict=True):
    print(f"{name:12s} test accuracy {100 * hits.float().mean():.1f} %")
print(f"The teachers disagree on {int(differ.sum())} of {len(labels)} test images.")

# %% [markdown]
# ## Distillation
#
# `run` trains the student, tests it once at the end, and writes its record into a folder: `metrics.csv`,
# `result.json`, `provenance.json`, checkpoints and `student.safetensors`. The first run fills the table of teacher
# outputs; the second one reads it.

# %%
results = {name: run(settings[name], OUT / name, config=asdict(settings[name])) for name in ASSIGNMENTS}
for name, result in results.items():
    branches = ", ".join(f"{100 * value:.1f}" for value in result["test_branch_accuracy"])
    print(
        f"{LABELS[name]}: test accuracy {100 * result['test_accuracy']:.1f} % (branches {branches}); "
        f"{100 * result['teacher_table_hit_rate']:.0f} % of the teacher outputs came from the table"
    )

# %% [markdown]
# ## Terms of the loss
#
# Each curve is one term of the method before its weight. The dashed line is the control.


# %%
def curves(name: str) -> dict[str, list[float]]:
    with (OUT / name / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["train/loss"]]
    return {key: [float(row[key]) for row in rows] for key in rows[0] if key.startswith(("train/", "val/acc"))}


terms = settings["one_to_one"].method.terms
history = {name: curves(name) for name in ASSIGNMENTS}
panels = [f"train/{term}" for term in terms] + ["val/accuracy"]
figure, axes = plt.subplots(2, 3, figsize=(10, 5.4), sharex=True)
for axis, key in zip(axes.flat, panels, strict=True):
    for name, style in zip(ASSIGNMENTS, ("-", "--"), strict=True):
        epochs = range(1, len(history[name][key]) + 1)
        axis.plot(epochs, history[name][key], style, marker="o", markersize=4, label=LABELS[name])
    weight = terms.get(key.removeprefix("train/"), {}).get("weight")
    axis.set_title(key if weight is None else f"{key} (weight {weight:g})")
    axis.set_ylim(bottom=0)
for axis in axes[1]:
    axis.set_xlabel("epoch")
axes[0, 0].legend()
figure.tight_layout()
plt.show()

first, last = ({t: history["one_to_one"][f"train/{t}"][i] for t in terms} for i in (0, -1))
fallen = [f"{t} {first[t]:.2f} → {last[t]:.2f}" for t in terms if last[t] < first[t]]
print(f"Terms of EKD that fell from the first epoch to the last: {'; '.join(fallen) or 'none'}.")
risen = [f"{t} {first[t]:.2f} → {last[t]:.2f}" for t in terms if last[t] >= first[t]]
print(f"Terms that did not: {'; '.join(risen) or 'none'}.")

# %% [markdown]
# ## Accuracy of branches, ensemble and teachers
#
# The bars are one standard error over the test images. They do not include the variation between seeds.

# %%
outputs = {}
for name in ASSIGNMENTS:
    with torch.no_grad():
        outputs[name] = load_student(OUT / name / "student.safetensors").outputs(images)

hits = {f"teacher {m}: {name}": teacher_hits[m] for m, name in enumerate(teacher_names)}
for name, output in outputs.items():
    for k, logits in enumerate(output.branch_logits):
        hits[f"{LABELS[name]}: branch {k}"] = logits.argmax(-1) == labels
    hits[f"{LABELS[name]}: ensemble"] = output.logits.argmax(-1) == labels

colours = {"teacher": "tab:gray", "EKD": "tab:blue", "control": "tab:orange"}
figure, axis = plt.subplots(figsize=(8, 4.6))
for place, (label, hit) in enumerate(hits.items()):
    share = float(hit.float().mean())
    error = (share * (1 - share) / len(hit)) ** 0.5
    colour = next(value for start, value in colours.items() if label.startswith(start))
    marker = "D" if label.endswith("ensemble") else "o"
    axis.errorbar(100 * share, place, xerr=100 * error, fmt=marker, color=colour, capsize=3)
    axis.annotate(
        f"{100 * share:.1f}", (100 * share, place), xytext=(0, 5), textcoords="offset points", ha="center", size=8
    )
axis.set_yticks(range(len(hits)), list(hits))
axis.invert_yaxis()
axis.set_ylim(len(hits) - 0.5, -0.8)
axis.set_xlabel(f"accuracy on {len(labels)} test images, %")
axis.grid(axis="x", alpha=0.3)
figure.tight_layout()
plt.show()


def compare(what: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Difference of two accuracies on the same images, against its own standard error."""
    gap = a.double() - b.double()
    mean, error = 100 * float(gap.mean()), 100 * float(gap.std() / len(gap) ** 0.5)
    verdict = "more" if abs(mean) > 2 * error else "not more"
    print(f"{what}: {mean:+.1f} points, {verdict} than two standard errors ({error:.1f} each).")


for name in ASSIGNMENTS:
    branch_hits = outputs[name].branch_logits.argmax(-1) == labels
    mean_branch = branch_hits.double().mean(0)
    compare(f"{LABELS[name]}, ensemble against its mean branch", hits[f"{LABELS[name]}: ensemble"], mean_branch)
compare("EKD against the control, ensembles", *(hits[f"{LABELS[name]}: ensemble"] for name in ASSIGNMENTS))

# %% [markdown]
# ## Do the branches differ from each other?
#
# Share of test images on which two branches predict different classes.

# %%
pairs = list(combinations(range(3), 2))
figure, axis = plt.subplots(figsize=(6.4, 3.2))
disagreement = {}
for shift, name in zip((-0.2, 0.2), ASSIGNMENTS, strict=True):
    choices = outputs[name].branch_logits.argmax(-1)
    disagreement[name] = [100 * float((choices[i] != choices[j]).float().mean()) for i, j in pairs]
    colour = colours["EKD" if name == "one_to_one" else "control"]
    bars = axis.bar(
        [place + shift for place in range(len(pairs))], disagreement[name], 0.38, color=colour, label=LABELS[name]
    )
    axis.bar_label(bars, fmt="%.1f", padding=2, size=8)
axis.set_xticks(range(len(pairs)), [f"branches {i} and {j}" for i, j in pairs])
axis.set_ylabel("disagreement, %")
axis.set_ylim(0, 1.45 * max(1.0, *(value for values in disagreement.values() for value in values)))
axis.legend(loc="upper right", ncols=2)
figure.tight_layout()
plt.show()

ekd, control = (sum(disagreement[name]) / len(pairs) for name in ASSIGNMENTS)
verdict = "more" if ekd > control else "no more"
print(
    f"Mean disagreement of two branches: EKD {ekd:.1f} %, control {control:.1f} %. "
    f"With a teacher each, branches disagree {verdict} than with one common target."
)
for name in ASSIGNMENTS:
    print(
        f"{LABELS[name]}: the NLL of the averaged logits is {results[name]['test_ambiguity']:.3f} nats below "
        "the branches' mean NLL."
    )

# %% [markdown]
# ## Which teacher does each branch follow?
#
# Two measures for every branch and teacher. *Agreement*: the share of test images on which both predict the same
# class. *Distance*: T² KL(teacher ‖ branch) at the method's temperature, which is what `kd_branch` minimises; it
# compares all probabilities, not only the predicted class. The control shows how close a branch comes to a teacher
# without being assigned to it. A frame marks the nearest teacher of each branch, the first one among equals.

# %%
T = settings["one_to_one"].method.temperature


def agreement(branch_logits: torch.Tensor) -> torch.Tensor:
    """Share of images on which branch and teacher choose the same class, in %; [K, M]."""
    same = branch_logits.argmax(-1)[:, None] == teacher_logits.argmax(-1)[None]
    return 100 * same.float().mean(-1)


def distance(branch_logits: torch.Tensor) -> torch.Tensor:
    """Mean T² KL(teacher ‖ branch) in nats; [K, M]."""
    teacher = (teacher_logits / T).log_softmax(-1)[None]
    branch = (branch_logits / T).log_softmax(-1)[:, None]
    return T**2 * (teacher.exp() * (teacher - branch)).sum(-1).mean(-1)


measures = {
    "agreement, %": (agreement, "viridis", "{:.1f}", torch.argmax),
    "distance, nats": (distance, "viridis_r", "{:.2f}", torch.argmin),
}
figure, axes = plt.subplots(2, 2, figsize=(8.6, 7.4))
nearest = {}
for row, (title, (measure, colour_map, form, best)) in zip(axes, measures.items(), strict=True):
    matrices = {name: measure(outputs[name].branch_logits) for name in ASSIGNMENTS}
    low, high = (f(torch.stack(list(matrices.values()))).item() for f in (torch.min, torch.max))
    for axis, (name, matrix) in zip(row, matrices.items(), strict=True):
        axis.imshow(matrix, cmap=colour_map, vmin=low, vmax=high)
        nearest[title, name] = best(matrix, dim=1).tolist()
        for k, m in ((k, m) for k in range(matrix.shape[0]) for m in range(matrix.shape[1])):
            # Dark fields are low values of viridis and high ones of its reverse.
            place = (float(matrix[k, m]) - low) / max(high - low, 1e-9)
            dark = (place if colour_map == "viridis" else 1 - place) < 0.5
            colour = "white" if dark else "black"
            axis.text(m, k, form.format(float(matrix[k, m])), ha="center", va="center", color=colour)
            if nearest[title, name][k] == m:
                axis.add_patch(plt.Rectangle((m - 0.47, k - 0.47), 0.94, 0.94, fill=False, ec="red", lw=2))
        axis.set_title(f"{LABELS[name]}\n{title}")
        axis.set_xticks(range(len(teacher_names)), teacher_names)
        axis.set_yticks(range(len(matrix)), [f"branch {k}" for k in range(len(matrix))])
figure.tight_layout()
plt.show()

for (title, name), found in nearest.items():
    own = sum(k == m for k, m in enumerate(found))
    print(
        f"{LABELS[name]}, by {title.split(',')[0]}: branches 0, 1, 2 are nearest to teachers "
        f"{', '.join(map(str, found))}; {own} of {len(found)} to the one with their own number."
    )
followed = sum(k == m for k, m in enumerate(nearest["distance, nats", "one_to_one"]))
chance = sum(k == m for k, m in enumerate(nearest["distance, nats", "mean"]))
print(
    f"By distance, {followed} of 3 branches of EKD follow their own teacher; of the control, where numbers mean "
    f"nothing, {chance}. Three of three would come by blind chance once in 27 runs. "
    + (
        "The assignment left its mark on the branches."
        if followed == 3 and chance < 3
        else "On this run the assignment cannot be read off the branches with confidence."
    )
)

# %% [markdown]
# ## Next steps
#
# - `ekd-compare --methods ekd,ekd_mean,ekd_permuted --seeds 0,1,2 --output compare/digits` repeats this with controls
#   and seeds.
# - `ekd-train experiment=cifar10_limited` does it on CIFAR-10 with pretrained teachers.
# - `docs/extending.md` shows how to add a network, a term, a method, a teacher or a data set.
