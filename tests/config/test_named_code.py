"""Code that a configuration names: callbacks that are classes of where they may be, and modules of the user's own."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from pytorch_lightning.callbacks import Callback, EarlyStopping, Timer

from ekd_lightning.config.config import build_callback, import_user_modules
from ekd_lightning.errors import UserError

OWN = """
from fractions import Fraction
from pathlib import Path

from pytorch_lightning import Callback

from elsewhere_of_a_test import Foreign

ran = []


def function(**_):
    ran.append("function")


class Own(Callback):
    def __init__(self, number=0, nested=None):
        self.number, self.nested = number, nested


instance = Own()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Name of a module in the working directory, which names one beside it."""
    (tmp_path / "own_parts_of_a_test.py").write_text(OWN)
    foreign = "from pytorch_lightning import Callback\n\n\nclass Foreign(Callback):\n    pass\n"
    (tmp_path / "elsewhere_of_a_test.py").write_text(foreign)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_parts_of_a_test"
    for name in ("own_parts_of_a_test", "elsewhere_of_a_test"):
        sys.modules.pop(name, None)


def test_classes_of_lightning_and_of_the_user_are_built(own):
    stopping = build_callback(
        {"_target_": "pytorch_lightning.callbacks.EarlyStopping", "monitor": "val/accuracy", "patience": 3},
        "callbacks.x",
    )
    assert type(stopping) is EarlyStopping
    assert (stopping.monitor, stopping.patience) == ("val/accuracy", 3)
    assert type(build_callback({"_target_": "pytorch_lightning.callbacks.timer.Timer"}, "callbacks.x")) is Timer
    import_user_modules([own])
    built: Any = build_callback({"_target_": f"{own}.Own", "number": 3}, "callbacks.x", [own])
    assert built.number == 3
    assert isinstance(built, Callback)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "ekd_lightningx.run",
        "builtins.eval",
        "",
        "torch.load",
        "eval",
        "pytorch_lightning.Trainer",
        ".x",
        3,
    ],
)
def test_only_known_packages_are_looked_into(target):
    with pytest.raises(UserError, match=r"^callbacks\.x\._target_=.*: must begin with one of ekd_lightning, "):
        build_callback({"_target_": target}, "callbacks.x")


@pytest.mark.parametrize(
    "target",
    [
        "ekd_lightning.training.trainer.torch.load",  # reached through a module that imports it
        "ekd_lightning.files.os.system",
        "ekd_lightning.files.os",
        "ekd_lightning.files.Path",  # a class, but no callback
        "ekd_lightning.runs.directory.RunDirectory",
        "ekd_lightning.training.checkpoints.read_checkpoint",
        "ekd_lightning.cli.train.main",
        "pytorch_lightning.callbacks.timer.timedelta",
        "pytorch_lightning.callbacks.no_such.Timer",
        "pytorch_lightning.callbacks.NoSuch",
        "pytorch_lightning.callbacks.Timer.__init__.__globals__",
        "pytorch_lightning.callbacks.Timer.__subclasses__",
        "pytorch_lightning.callbacks.",
    ],
)
def test_what_is_reachable_is_not_what_is_defined(target):
    with pytest.raises(UserError, match=r"^callbacks\.x\._target_=.*: not a class of Lightning callbacks"):
        build_callback({"_target_": target, "f": "evil.pt", "weights_only": False}, "callbacks.x")


@pytest.mark.parametrize("name", ["function", "Foreign", "Fraction", "Path", "instance", "Own.__init__", "sys.exit"])
def test_a_users_module_gives_its_own_classes_alone(own, name):
    import_user_modules([own])
    with pytest.raises(UserError, match="not a class of Lightning callbacks"):
        build_callback({"_target_": f"{own}.{name}"}, "callbacks.x", [own])
    assert sys.modules[own].ran == []
    with pytest.raises(UserError, match="must begin with"):
        build_callback({"_target_": f"{own}.Own"}, "callbacks.x")


@pytest.mark.parametrize(
    "nested", [{"_target_": "os.system", "command": "true"}, [{"a": {"_target_": "x"}}], {"a": [[{"_target_": "x"}]]}]
)
def test_arguments_are_plain_values(own, nested):
    import_user_modules([own])
    with pytest.raises(UserError, match=r"^callbacks\.x\.nested: holds a _target_"):
        build_callback({"_target_": f"{own}.Own", "nested": nested}, "callbacks.x", [own])


@pytest.mark.parametrize("more", [{"patients": 3}, {"_args_": [1]}, {"_partial_": True}, {"mode": "up"}])
def test_what_refuses_its_arguments_is_named(more):
    node = {"_target_": "pytorch_lightning.callbacks.EarlyStopping", "monitor": "a", **more}
    with pytest.raises(UserError, match=r"^callbacks\.x: ") as caught:
        build_callback(node, "callbacks.x")
    assert next(iter(more)) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has no _target_"):
        build_callback({"patience": 3}, "callbacks.x")


def test_a_users_module_is_imported_from_the_working_directory(own):
    import_user_modules([own])
    assert sys.modules[own].ran == []
    with pytest.raises(UserError, match="no_such_module_here"):
        import_user_modules(["no_such_module_here"])
