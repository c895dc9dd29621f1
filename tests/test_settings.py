from __future__ import annotations

import pytest

from ekd_lightning.errors import UserError
from ekd_lightning.settings import (
    DataSettings,
    RecipeSettings,
    Settings,
    StudentSettings,
    TeacherEntry,
    TeacherSettings,
)


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
