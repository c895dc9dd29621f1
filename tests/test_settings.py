from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import pytest

from ekd_lightning.errors import UserError
from ekd_lightning.keys import (
    is_free,
    is_location,
    is_path,
    is_place,
    keys_where,
    may_change_between_parts,
    purpose_of,
    without_effect,
)
from ekd_lightning.roles import Role, conditions, purposes
from ekd_lightning.settings import (
    DataSettings,
    RecipeSettings,
    Settings,
    StudentSettings,
    TeacherEntry,
    TeacherSettings,
)


@pytest.mark.parametrize(("key", "other"), [(key, other) for key, other, _ in conditions(Settings)])
def test_what_counts_only_beside_something_else_is_said_where_it_does_not(key, other):
    """Every condition is about settings that there are; those at their defaults are passed by."""
    for name in (key, other):
        *groups, last = name.split(".")
        group = reduce(getattr, groups, Settings())
        assert group == {} or hasattr(group, last)
    assert without_effect(Settings(), [key], {other: None}) == {}


def test_settings_without_effect_are_named_with_what_they_lie_beside():
    recipe = RecipeSettings(gamma=0.5, momentum=0.8, optimizer="adamw")
    settings = Settings(recipe=recipe, teachers=TeacherSettings(count=2), trainer={"gradient_clip_algorithm": "norm"})
    given = ["recipe.gamma", "recipe.momentum", "recipe.lr", "teachers.count", "trainer.gradient_clip_algorithm"]
    assert list(without_effect(settings, given, {"method.name": False}).values()) == [
        "teachers.count=2 has no effect with method.name=ekd",
        "recipe.momentum=0.8 has no effect with recipe.optimizer=adamw",
        "recipe.gamma=0.5 has no effect with recipe.schedule=cosine",
        "trainer.gradient_clip_algorithm=norm has no effect with trainer.gradient_clip_val=None",
    ]
    assert without_effect(settings, ["teachers.count", "recipe"], {}) == {}
    settings.recipe.schedule = "step"
    assert without_effect(settings, ["recipe.gamma"], {}) == {}


def test_the_defaults_are_possible():
    Settings().check()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("inf")),
        ("lr", float("nan")),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("momentum", 0.0),  # with nesterov
        ("weight_decay", -1e-4),
        ("schedule", "cosinus"),
        ("milestones", [0.5, 1.0]),
        ("milestones", [60]),
        ("gamma", 0.0),
        ("warmup_epochs", 60),
        ("warmup_epochs", -1),
        ("mixup", -0.1),
        ("cutmix", float("inf")),
        ("cutmix", float("nan")),
    ],
)
def test_impossible_recipes(key, value):
    recipe = RecipeSettings(**{key: value})
    named = "nesterov" if (key, value) == ("momentum", 0.0) else key
    with pytest.raises(UserError, match=rf"teachers\.recipe\.{named}"):
        recipe.check("teachers.recipe")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (Settings(seed=-1), "seed=-1"),
        (Settings(student=StudentSettings(branches=0)), "student.branches=0"),
        (Settings(student=StudentSettings(branches=-1)), "student.branches=-1"),
        (Settings(data=DataSettings(fraction=0.0)), "data.fraction=0.0"),
        (Settings(data=DataSettings(fraction=1.5)), "data.fraction=1.5"),
        (Settings(data=DataSettings(fraction=10**309)), "0: must be a finite number"),
        (Settings(data=DataSettings(eval_batch_size=0)), "data.eval_batch_size=0"),
        (Settings(teachers=TeacherSettings(pool=["a"], count=2)), "teachers.count=2: the pool has only 1"),
        (Settings(teachers=TeacherSettings(pool=["a"], count=-1)), "teachers.count=-1"),
        (Settings(teachers=TeacherSettings(train_on="al")), "'all'"),
        (Settings(teachers=TeacherSettings(table="on")), "teachers.table"),
        (Settings(teachers=TeacherSettings(pool=[{}])), "teachers.pool[0]"),
        (Settings(teachers=TeacherSettings(pool=["a", {"zoo": "a", "train": "b"}])), "teachers.pool[1]"),
        (Settings(teachers=TeacherSettings(pool=[{"trian": "b"}])), "did you mean 'train'"),
        (Settings(teachers=TeacherSettings(pool=[3])), "teachers.pool[0]=3"),
    ],
)
def test_impossible_settings_are_named(settings, named):
    with pytest.raises(UserError) as caught:
        settings.check()
    assert named in str(caught.value)


def test_entries_of_the_pool():
    pool = ["some_id", {"train": "resnet8", "seed": 3}, TeacherEntry(file="x.safetensors")]
    settings = TeacherSettings(pool=pool)
    assert settings.entry(0) == TeacherEntry(zoo="some_id")
    assert settings.entry(1) == TeacherEntry(train="resnet8", seed=3)
    assert settings.entry(2).file == "x.safetensors"


LOCATIONS = {"data.root", "data.download", "teachers.weights_dir", "teachers.download", "teachers.store", "data.cache"}


def test_every_setting_says_what_it_is_for():
    """`purposes` refuses a field that does not; what is listed here is what commands promise."""
    assert set(keys_where(is_location)) == LOCATIONS
    places = {"data.root", "data.cache", "teachers.weights_dir", "teachers.store"}
    assert set(keys_where(is_path)) == places | {"data.unlabelled"}  # or a word
    assert all(is_place(key, "rest") for key in places)
    assert is_place("data.unlabelled", "birds")
    assert not any(is_place("data.unlabelled", value) for value in ("rest", "split", None))
    assert not is_place("data.download", True)
    assert set(keys_where(is_free)) - LOCATIONS == {
        "teachers.fill",
        "trainer.enable_progress_bar",
        "trainer.enable_checkpointing",
        "evaluation",
        "logger",
        "metric",
        "tags",
        "resume",
        "overwrite",
    }
    assert set(keys_where(may_change_between_parts)) - set(keys_where(is_free)) == {
        "trainer.max_epochs",
        "trainer.max_steps",
        "trainer.max_time",
        "callbacks",
    }
    assert not is_free("student.compile")
    assert is_free("student.compile", exact=False)  # it rounds
    assert not is_free("recipe.lr", exact=False)


@pytest.mark.parametrize(
    ("key", "role"),
    [
        ("data.root", Role.LOCATION),
        ("logger.wandb.mode", Role.FREE),
        ("trainer.accelerator", Role.FREE),
        ("trainer.limit_val_batches", Role.COMPUTED),
        ("trainer.limit_test_batches", Role.COMPUTED),
        ("trainer.check_val_every_n_epoch", Role.COMPUTED),
        ("trainer.val_check_interval", Role.COMPUTED),
        ("trainer.limit_train_batches", Role.COMPUTED),
        ("trainer.a_flag_to_come", Role.COMPUTED),
        ("trainer.threads", Role.FREE),
        ("trainer.precision", Role.PROTOCOL),
        ("recipe.epochs", Role.PROTOCOL),
        ("teachers.recipe.epochs", Role.COMPUTED),  # it is the teachers', whatever the same key is to a run
        ("method.terms.kd_ensemble.weight", Role.COMPUTED),
        ("callbacks.early_stopping.patience", Role.COMPUTED),
        ("a.setting.of.another.version", Role.COMPUTED),
    ],
)
def test_a_key_has_the_role_of_what_it_lies_in(key, role):
    assert purpose_of(key).role is role


def test_a_field_without_a_purpose_is_refused():
    @dataclass
    class Careless:
        size: int = 3

    with pytest.raises(TypeError, match=r"Careless\.size"):
        dict(purposes(Careless))


def test_fine_tuning_beside_a_file_is_refused_with_what_a_file_takes():
    pool = [{"file": "a.safetensors", "finetune": "head", "seed": 1}]
    takes = "network, key_map, options, normalization"
    said = rf"\.(finetune|seed) has no effect together with file, which takes the settings {takes}$"
    with pytest.raises(UserError, match=said):
        TeacherSettings(pool=pool).check()
