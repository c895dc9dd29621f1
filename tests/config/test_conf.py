"""Every file of conf/: it composes, its values are possible, and nothing in it is unknown."""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import ekd_lightning.conf
from ekd_lightning.config.config import build_callback, register_schema, to_plain, to_settings, write_config
from ekd_lightning.data.views import make_views
from ekd_lightning.errors import UserError
from ekd_lightning.methods import TermContext, build_method, needs_teachers
from ekd_lightning.methods.terms import TERMS, options_of
from ekd_lightning.networks import NetworkSpec, build_network, normalization
from ekd_lightning.networks.zoo import zoo
from ekd_lightning.training.trainer import check_trainer

CONF = Path(next(iter(ekd_lightning.conf.__path__)))
GROUPS = (
    "data",
    "teachers",
    "student",
    "method",
    "recipe",
    "trainer",
    "logger",
    "callbacks",
    "experiment",
    "evaluation",
    "debug",
)
FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.rglob("*.yaml"))
OPTIONS = [(path.parent.as_posix(), path.name) for path in FILES if path.parent.as_posix() in GROUPS]
OURS = {"devices": 1, "max_epochs": 15, "precision": "auto", "num_sanity_val_steps": 0, "enable_model_summary": False}


def composed(*overrides: str, name: str = "train", hydra: bool = False):
    register_schema()
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        return compose(name, overrides=list(overrides), return_hydra_config=hydra)


@pytest.mark.parametrize("name", [name for name in TERMS.names() if TERMS[name].__module__.startswith("ekd_")])
def test_every_option_of_a_term_is_set_without_a_plus(name):
    words = []
    for option, known in (options := options_of(name)).items():
        value = list(known.default) if isinstance(known.default, tuple) else known.default
        words.append(f"method.terms.{name}.{option}={'null' if value is None else str(value).replace(chr(39), '')}")
    cfg = composed(f"+method.terms.{name}={{weight: 1.0}}", *words)
    terms = to_settings(cfg).method.terms
    assert set(terms[name]) == {"weight", *options}
    needs_teachers(terms)  # checks all names


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "method.terms.kd_branch.tempo=3",
            "method.terms.kd_branch: unknown option of term 'kd_branch': 'tempo'; did you",
        ),
        (
            "method.terms.kd_brnch.temperature=3",
            "unknown term 'method.terms.kd_brnch'; did you mean 'method.terms.kd_bran",
        ),
        ("method.terms.kd_brnch.weight=3", "method.terms.kd_brnch: unknown term 'kd_brnch'; did you mean 'kd_branch'"),
        ("method.terms.dkd.alpha=3", "method.terms.dkd={'alpha': 3} is not allowed; give at least a weight"),
    ],
)
def test_options_and_terms_that_do_not_exist_are_refused_with_the_nearest(word, message):
    terms = to_settings(composed(word)).method.terms
    with pytest.raises(UserError, match=re.escape(message)):
        needs_teachers(terms)


def option_names(group: str) -> list[str]:
    return [name for other, name in OPTIONS if other == group]


def test_every_file_is_in_a_known_place():
    elsewhere = [path.as_posix() for path in FILES if path.parent.as_posix() not in GROUPS]
    assert {name.split("/")[0] for name in elsewhere} <= {"train", "teach", "hydra", "local", "study"}
    assert {group for group, _ in OPTIONS} == set(GROUPS)


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=["/".join(pair) for pair in OPTIONS])
def test_every_option_composes_into_possible_settings(group, name, tmp_path):
    cfg = composed(f"{group}={name}")
    settings = to_settings(cfg)
    settings.check()
    check_trainer(settings.trainer)
    for key, node in settings.callbacks.items():
        assert isinstance(build_callback(node, key), pl.Callback)
    plain = to_plain(cfg)
    write_config(plain, tmp_path)  # what is written down is what was composed
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml")) == plain


@pytest.mark.parametrize("name", ["train", "teach"])
def test_the_main_files_compose(name):
    to_settings(composed(name=name)).check()


@pytest.mark.parametrize(
    ("launcher", "plugin"),
    [("parallel", "joblib"), ("shared_gpu", "joblib"), ("processes", "submitit"), ("slurm", "submitit")],
)
def test_launchers_compose_with_their_plugins(launcher, plugin):
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    cfg = composed(f"hydra/launcher={launcher}", "trainer.devices=2", hydra=True)
    node: Any = OmegaConf.to_container(cfg, resolve=False)
    node = node["hydra"]["launcher"]
    assert "Launcher" in node["_target_"]
    if launcher == "processes":
        assert cfg.hydra.launcher.gpus_per_node == 2
    if launcher == "slurm":
        assert (cfg.hydra.launcher.tasks_per_node, cfg.hydra.launcher.gpus_per_node) == (2, 2)


def test_trainer_flags_are_those_of_lightning_with_its_defaults_but_ours():
    flags = yaml.safe_load((CONF / "trainer" / "default.yaml").read_text())
    assert flags.pop("threads") is None  # ours, and no flag of Lightning's
    signature = inspect.signature(pl.Trainer).parameters
    assert set(flags) == set(signature) - {"logger", "callbacks", "default_root_dir"}
    different = {name for name, value in flags.items() if value != signature[name].default}
    same_meaning = {"log_every_n_steps", "accumulate_grad_batches"} & different  # null means these numbers
    assert different - same_meaning == set(OURS)
    trainer = to_settings(composed()).trainer
    assert {name: trainer[name] for name in OURS} == OURS


@pytest.mark.parametrize("name", option_names("trainer"))
def test_a_trainer_option_changes_only_what_it_says(name):
    own = yaml.safe_load((CONF / "trainer" / f"{name}.yaml").read_text())
    found, default = (to_settings(composed(f"trainer={n}")).trainer for n in (name, "default"))
    own.pop("defaults", None)
    if name != "default":
        assert {key for key in found if found[key] != default[key]} <= set(own)


@pytest.mark.parametrize("name", option_names("method"))
@pytest.mark.parametrize("branches", [None, 3])
def test_every_method_builds_with_three_teachers(name, branches):
    settings = to_settings(composed(f"method={name}", *([f"student.branches={branches}"] if branches else [])))
    assert settings.method.name == name
    shapes = {"stem": (16, 32, 32), "stage1": (16, 32, 32), "stage2": (32, 16, 16), "stage3": (64, 8, 8)}
    method = build_method(
        name,
        settings.method.terms,
        TermContext(
            num_classes=10,
            num_branches=settings.student.branches,
            num_teachers=3,
            student_features=64,
            teacher_features=(64, 64, 64),
            student_stage_shapes=shapes,
            teacher_stage_shapes=(shapes,) * 3,
            train_index=torch.arange(20),
            train_labels=torch.arange(20) % 10,
        ),
        temperature=settings.method.temperature,
        assignment=settings.method.assignment,
    )
    given = [key for key, term in settings.method.terms.items() if term["weight"] > 0]
    assert list(method.terms) == given


def test_one_override_is_an_ablation():
    ablation = ([], ["method.terms.maps1.weight=0"])
    whole, without = (to_settings(composed(*words)).method.terms for words in ablation)
    expected = copy.deepcopy(whole)
    expected["maps1"]["weight"] = 0
    assert without == expected


@pytest.mark.parametrize("name", option_names("student"))
@pytest.mark.parametrize("data", ["cifar10", "cifar100", "digits"])
def test_every_student_builds_for_every_data_set(name, data):
    from ekd_lightning.networks import BranchedStudent

    student = to_settings(composed(f"student={name}", f"data={data}")).student
    spec = NetworkSpec(student.network, 10, normalization("unit"), student.options)
    with torch.device("meta"):
        built = BranchedStudent(
            spec, branches=student.branches, split_after=student.split_after, ensemble=student.ensemble
        )
    assert built.num_branches == 3


@pytest.mark.parametrize("name", option_names("teachers"))
def test_every_teacher_of_every_pool_exists(name):
    teachers = to_settings(composed(f"teachers={name}")).teachers
    entries = [teachers.entry(position) for position in range(len(teachers.pool))]
    for entry in entries:
        if entry.zoo:
            assert zoo()[entry.zoo].data in name
        else:
            with torch.device("meta"):
                build_network(NetworkSpec(entry.train, 10, normalization("unit"), entry.options))
    assert len({(e.zoo, e.train, e.seed) for e in entries}) == len(entries)


@pytest.mark.parametrize("name", option_names("data"))
def test_every_data_option_brings_its_teachers_recipe_and_views(name):
    cfg = composed(f"data={name}", hydra=True)
    choices = cfg.hydra.runtime.choices
    assert (choices.teachers, choices.recipe) == (name, name)
    data = to_settings(composed(f"data={name}")).data
    if data.source is None:  # else the padding is an eighth of the images' side
        assert make_views(data.augmentation, data.padding, data.flip).num_views == (25 if name == "digits" else 162)


def test_a_chosen_pool_or_recipe_is_kept_beside_the_data():
    cfg = composed("data=cifar10", "teachers=trained", "recipe=step", hydra=True)
    assert (cfg.hydra.runtime.choices.teachers, cfg.hydra.runtime.choices.recipe) == ("trained", "step")


@pytest.mark.parametrize("data", ["cifar10", "folder", "digits"])
def test_all_teachers_of_a_pool_teach_however_many_there_are(data):
    for pool in ("[{timm: resnet18}]", "[{train: resnet8, seed: 0}, {train: resnet8, seed: 1}]"):
        settings = to_settings(composed(f"data={data}", f"teachers.pool={pool}"))
        settings.teachers.check()
        assert settings.teachers.count is None


@pytest.mark.parametrize("name", ["sweep_counts", "sweep_fraction"])
def test_stored_sweeps_are_sweeps_of_known_keys(name):
    cfg = composed(f"experiment={name}", hydra=True)
    assert cfg.hydra.mode.name == "MULTIRUN"
    for key, values in cfg.hydra.sweeper.params.items():
        for value in str(values).split(","):
            to_settings(composed(f"experiment={name}", f"{key}={value}")).check()


def test_defaults_of_the_schema_that_conf_does_not_repeat():
    from ekd_lightning.settings import Settings

    settings = to_settings(composed())
    assert (settings.seed, settings.metric, settings.resume) == (0, "val_accuracy", None)
    assert settings.channels_last == Settings().channels_last
