"""docs/architecture.md and docs/extending.md are true: who imports whom, and every snippet that adds a part."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from torch.nn import functional

from ekd_lightning.cli.train import main as ekd_train
from ekd_lightning.config.config import import_user_modules, register_schema, to_settings
from ekd_lightning.data import Batch, augmentations, catalog, load_dataset
from ekd_lightning.data.loader import TrainLoader, gather_batch
from ekd_lightning.methods import terms
from ekd_lightning.networks import TeacherEnsemble, convert, load_network, registry, state_sha256
from ekd_lightning.pipeline.prepare import Prepared, prepare
from ekd_lightning.settings import Settings
from ekd_lightning.training.pool import gather_teachers

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE, PAGE = (ROOT / "docs" / name for name in ("architecture.md", "extending.md"))
SOURCE = ROOT / "src" / "ekd_lightning"

# -- the rooms ----------------------------------------------------------------------------------------------

LEVELS = (
    ("cli",),
    ("bench", "studies"),
    ("config", "reporting"),
    ("pipeline",),
    ("training",),
    ("teachers",),
    ("tracking",),
    ("runs",),
    ("evaluation", "methods"),
    ("networks", "data"),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
HYDRA = {"hydra", "omegaconf"}
FRAMEWORKS = {*LIGHTNING, *HYDRA, "wandb"}
ALLOWED = {
    **dict.fromkeys(("cli", "config", "studies"), FRAMEWORKS),
    **dict.fromkeys(("bench", "reporting", "tracking", "training", "pipeline"), FRAMEWORKS - HYDRA),
}


CHANGES = (
    "a loss", "a method", "a network", "a data set", "an augmentation", "a logger", "a metric", "a figure", "a command",
    "a launcher", "a teacher's source", "a recipe",
)  # fmt: skip


def test_a_usual_change_opens_at_most_three_files_that_exist():
    table = ARCHITECTURE.read_text().split("\n## Which files to open for a change\n")[1]
    rows = re.findall(r"^\| (an? .+?) \| (.+) \|$", table, re.MULTILINE)
    assert tuple(what for what, _ in rows) == CHANGES
    for what, told in rows:
        names = re.findall(r"`([\w./-]+\.\w+)`", told)
        assert 1 <= len(names) <= 3, what
        assert [name for name in names if not any((top / name).is_file() for top in (SOURCE, ROOT))] == [], what


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, as a dotted name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_room_has_a_place_and_a_row():
    rooms = {path.parent.name for path in SOURCE.glob("*/__init__.py") if not path.parent.is_symlink()}
    assert rooms == set(LEVEL)
    assert [room for room in rooms if f"| `{room}/` |" not in ARCHITECTURE.read_text()] == []


@pytest.mark.parametrize("room", LEVEL)
def test_a_room_imports_itself_and_rooms_further_right_only(room: str):
    allowed = {room, *(other for other in LEVEL if LEVEL[other] > LEVEL[room])}
    for path in (SOURCE / room).rglob("*.py"):
        used = {name.split(".")[1] for name in imports(path) if name.startswith("ekd_lightning.")}
        assert used & set(LEVEL) <= allowed, path


def test_no_circle_of_files():
    files = {
        ".".join(("ekd_lightning", *path.relative_to(SOURCE).with_suffix("").parts)): path
        for path in SOURCE.rglob("*.py")
        if path.stem != "__init__"
    }
    left = {
        name: {other for used in imports(path) for other in (used, used.rpartition(".")[0]) if other in files}
        for name, path in files.items()
    }
    while free := [name for name, uses in left.items() if not uses & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


@pytest.mark.parametrize("room", LEVEL)
def test_only_the_outer_rooms_know_frameworks(room: str):
    for path in (SOURCE / room).rglob("*.py"):
        allowed = LIGHTNING if path == SOURCE / "data" / "datamodule.py" else ALLOWED.get(room, set())
        assert {name.split(".")[0] for name in imports(path)} & FRAMEWORKS <= allowed, path


def test_internals_of_hydra_stand_in_one_file():
    private = ("hydra._internal", "hydra.core.plugins", "hydra.core.override_parser", "hydra.core.global_hydra")
    used = {
        p.relative_to(SOURCE).as_posix() for p in SOURCE.rglob("*.py") if any(n.startswith(private) for n in imports(p))
    }
    assert used == {"config/internals.py"}


def test_the_inner_rooms_load_no_framework():
    inner = ("data", "networks", "methods", "evaluation.scores", "evaluation.efficiency")
    code = "\n".join([*(f"import ekd_lightning.{room}" for room in inner), "import sys; print(*sys.modules)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in done.stdout.split()} & FRAMEWORKS


# -- the snippets -------------------------------------------------------------------------------------------


@dataclass
class Snippets:
    """What the page shows: files, now in a folder; Python that was executed; commands."""

    folder: Path
    names: dict[str, Any] = field(default_factory=dict)
    commands: list[list[str]] = field(default_factory=list)


def extract(folder: Path) -> Snippets:
    """Writes the snippets that name a file, executes other Python in order, and collects the commands."""
    found = Snippets(folder)
    for language, body in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        named = re.match(r"(?:# @package \S+\n)?# (\S+\.(?:py|yaml))\n", body)
        if named:
            path = folder / named[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as stream:
                stream.write(body)
        elif language == "python":
            exec(compile(body, str(PAGE), "exec"), found.names)
        elif language != "toml":  # of somebody else's package
            assert language == "bash", body
            found.commands += [shlex.split(line) for line in body.splitlines()]
    return found


@contextlib.contextmanager
def registries_as_before() -> Iterator[None]:
    """Forgets afterwards what was registered inside."""
    live: tuple[dict[Any, Any], ...] = (
        registry.NETWORKS,
        terms.TERMS,
        catalog.DATASETS,
        catalog._LOADED,
        convert.KEY_MAPS,
        augmentations.AUGMENTATIONS,
    )
    before = [dict(names) for names in live]
    try:
        yield
    finally:
        for names, old in zip(live, before, strict=True):
            names.clear()
            names.update(old)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Snippets]:
    """The page's snippets in a folder of their own, which is the working directory; `my_parts` is imported."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch, registries_as_before():
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        for name in ("EKD_DATA_ROOT", "EKD_WEIGHTS_DIR", "EKD_STORE"):
            patch.delenv(name, raising=False)
        found = extract(folder)
        theirs = {
            re.sub(r"^stages\.", "backbone.", re.sub(r"^head\.", "classifier.", name)): value
            for name, value in found.names["network"].state_dict().items()
        }
        torch.save(theirs, folder / "their_resnet8.pt")
        import_user_modules(["my_parts"])
        yield found
        sys.modules.pop("my_parts", None)


def settings(page: Snippets, *overrides: str) -> Settings:
    """What `ekd-train --config-dir my_conf` composes."""
    register_schema()
    folder = f"hydra.searchpath=[file://{page.folder / 'my_conf'}]"
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        return to_settings(compose("train", overrides=[folder, "trainer=cpu", *overrides]))


def step(prepared: Prepared, teachers: TeacherEnsemble | None = None) -> dict[str, float]:
    """One optimiser step on one batch; every parameter of the student must get a gradient and move."""
    student, method = prepared.student.train(), prepared.method
    before = {name: value.clone() for name, value in student.named_parameters()}
    parameters = [*student.parameters(), *method.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    batch = first_batch(prepared)
    taught = teachers(batch.images, method.teacher_stages) if teachers else None
    loss = method(student.outputs(batch.images), taught, batch)
    loss.total.backward()
    assert all(parameter.grad is not None for parameter in parameters)
    optimizer.step()
    assert [name for name, value in student.named_parameters() if torch.equal(value, before[name])] == []
    return {name: float(value) for name, value in loss.terms.items()}


def first_batch(prepared: Prepared) -> Batch:
    images = prepared.dataset.train
    loader = TrainLoader(images, prepared.subset.train_index, prepared.views, batch_size=32, seed=0)
    return gather_batch(images.images, next(iter(loader)), prepared.views)


def test_the_network_trains_one_step_as_a_student(page: Snippets):
    prepared = prepare(settings(page, "student=plain4", "method=branched_ce"), "cpu")
    assert prepared.student.num_branches == 2
    assert prepared.student.stage_shapes() == {
        "stem": (8, 32, 32),
        "stage1": (8, 16, 16),
        "stage2": (16, 8, 8),
        "stage3": (32, 4, 4),
    }
    assert step(prepared).keys() == {"ce_ensemble", "ce_branch"}


def test_the_term_appears_beside_those_of_ekd_with_its_value(page: Snippets):
    prepared = prepare(settings(page, "student=plain4", "method=ekd_confidence", "teachers=mine"), "cpu")
    batch = first_batch(prepared)
    with torch.no_grad():
        logits = prepared.student.train().outputs(batch.images).branch_logits
        p = functional.softmax(logits / 2.0, dim=-1)
    found = step(prepared, gather_teachers(prepared.teachers))
    terms = {"ce_ensemble", "ce_branch", "kd_ensemble", "kd_branch", "maps1", "maps2", "maps3"}
    assert found.keys() == {*terms, "confidence"}
    assert found["confidence"] == pytest.approx(float((p * p.log()).sum(-1).mean()), abs=1e-5)
    without = settings(page, "method=ekd_confidence", "method.terms.confidence.weight=0", "teachers=mine")
    assert set(prepare(without, "cpu").method.terms) == terms


def test_the_method_is_chosen_by_name_and_uses_a_term_twice(page: Snippets):
    chosen = settings(page, "method=mine", "teachers=mine")
    assert chosen.method.name == "mine"
    prepared = prepare(chosen, "cpu")
    found = step(prepared, gather_teachers(prepared.teachers))
    assert found.keys() == {"ce_branch", "soft", "sharp"}
    assert found["soft"] != found["sharp"]
    assert {name: term.temperature for name, term in prepared.method.named_terms() if name != "ce_branch"} == {
        "soft": 8.0,
        "sharp": 1.0,
    }


def test_the_teachers_come_from_their_files(page: Snippets):
    plans = prepare(settings(page, "teachers=mine"), "cpu").teachers
    own, foreign = gather_teachers(plans).members
    assert state_sha256(own) == state_sha256(foreign) == state_sha256(page.names["network"])
    assert state_sha256(load_network("my_teacher.safetensors")) == state_sha256(own)
    three = prepare(settings(page, "teachers=mine", "teachers.count=3"), "cpu").teachers
    assert [plan.source for plan in three] == ["file", "file", "trained"]


def test_the_data_set_loads_with_subsets_and_views(page: Snippets):
    dataset = load_dataset("stripes", page.folder)
    assert dataset.class_names == ("across", "upright")
    assert [tuple(part.images.shape) for part in (dataset.train, dataset.test)] == [(400, 3, 32, 32), (100, 3, 32, 32)]
    across, upright = dataset.train.images[0], dataset.train.images[1]
    assert torch.equal(across, across[:, :, :1].expand_as(across))
    assert torch.equal(upright, upright[:, :1].expand_as(upright))
    prepared = prepare(settings(page, "data=stripes", "data.fraction=0.5", "student=plain4"), "cpu")
    used = torch.cat([prepared.subset.train_index, prepared.subset.val_index])
    assert dataset.train.labels[used].bincount().tolist() == [100, 100]
    assert prepared.views.num_views == 50
    assert [plan.spec.name for plan in prepared.teachers] == ["plain4", "plain4"]


def test_the_augmentation_makes_a_pool_of_views(page: Snippets):
    prepared = prepare(settings(page, "experiment=inverted", "data=stripes", "student=plain4"), "cpu")
    views, images = prepared.views, prepared.dataset.train.images
    assert (views.num_views, views.identity_view) == (32, None)
    assert 'invert{"p": 0.2}' in views.key
    alone = settings(page, "data=stripes", "student=plain4", "data.augmentation=invert")
    index = torch.arange(400)
    made = prepare(alone, "cpu").views(images, index % 64, index)
    inverted = (made == 255 - images).flatten(1).all(1)
    assert torch.equal(made[~inverted], images[~inverted])
    assert 0.4 < float(inverted.float().mean()) < 0.6


def call(words: list[str], directory: Path) -> dict[str, Any]:
    """Runs an `ekd-train` command in this process and returns its record."""
    assert words[0] == "ekd-train"
    root, environment = logging.getLogger(), dict(os.environ)
    handlers, level = list(root.handlers), root.level
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [*words, f"hydra.run.dir={directory}"])
            ekd_train()
    finally:
        root.handlers, root.level = handlers, level
        os.environ.clear()
        os.environ.update(environment)
    return json.loads((directory / "result.json").read_text())


def test_the_commands_run_from_the_users_folder(page: Snippets, tmp_path: Path):
    first, second = page.commands
    small = ["trainer=cpu", "trainer.precision=32-true", "trainer.limit_test_batches=1"]
    few = ["data.fraction=0.1", "data.eval_batch_size=100", "recipe.epochs=1", "recipe.batch_size=32"]
    result = call([*first, *small, *few, "teachers=mine"], tmp_path / "first")
    assert result["method"] == "mine"
    assert [teacher["id"] for teacher in result["teachers"]] == ["my_teacher", "their_resnet8"]

    result = call([*second, *small], tmp_path / "second")
    assert (result["data"], result["student"], result["method"]) == ("stripes", "plain4", "ekd_confidence")
    assert [teacher["id"] for teacher in result["teachers"]] == ["plain4-s0", "plain4-s1"]
    assert result["test_accuracy"] > 0.9  # stripes are easy; chance is 0.5
    assert "train/confidence" in (tmp_path / "second" / "metrics.csv").read_text().splitlines()[0].split(",")


def test_the_record_holds_the_files_that_the_page_lists(page: Snippets, tmp_path: Path):
    few = ["data.fraction=0.1", "recipe.epochs=1", "recipe.batch_size=32", "trainer=cpu"]
    call(["ekd-train", "student=resnet8", "method=ce", *few], tmp_path / "run")
    listed = re.findall(
        r"^\| `([\w./]+)` \|", (ROOT / "docs" / "run_directory.md").read_text().split("\n## ")[0], re.MULTILINE
    )
    assert len(listed) == 8
    assert [name for name in listed if not (tmp_path / "run" / name).exists()] == []
