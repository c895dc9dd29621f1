"""Code that a configuration names: callbacks that are classes of where they may be, and modules of the user's own."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
from pytorch_lightning.callbacks import Callback, EarlyStopping, Timer

from ekd_lightning import errors
from ekd_lightning.bench.measurements import make_bench
from ekd_lightning.cli import data
from ekd_lightning.config.config import build_callback, import_user_modules
from ekd_lightning.data import catalog
from ekd_lightning.errors import STARTED_IN, UserError
from ekd_lightning.methods import terms
from ekd_lightning.networks import NetworkSpec, build_network, normalization, registry
from ekd_lightning.runs.writer import provenance

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
    with pytest.raises(UserError, match=r"^callbacks\.x\._target_=.*: .* defines no class of Lightning callbacks"):
        build_callback({"_target_": target, "f": "evil.pt", "weights_only": False}, "callbacks.x")


@pytest.mark.parametrize("name", ["function", "Foreign", "Fraction", "Path", "instance", "Own.__init__", "sys.exit"])
def test_a_users_module_gives_its_own_classes_alone(own, name):
    import_user_modules([own])
    with pytest.raises(UserError, match="defines no class of Lightning callbacks"):
        build_callback({"_target_": f"{own}.{name}"}, "callbacks.x", [own])
    assert sys.modules[own].ran == []
    with pytest.raises(UserError, match="must begin with"):
        build_callback({"_target_": f"{own}.Own"}, "callbacks.x")


@pytest.mark.parametrize(
    "nested", [{"_target_": "os.system", "command": "true"}, [{"a": {"_target_": "x"}}], {"a": [[{"_target_": "x"}]]}]
)
def test_arguments_are_plain_values(own, nested):
    import_user_modules([own])
    with pytest.raises(UserError, match=r"^callbacks\.x\.nested: contains a _target_"):
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


PLUGIN = """
from torch import nn

from ekd_lightning.methods import Term, register_term
from ekd_lightning.methods.terms import TERMS
from ekd_lightning.networks import StagedNetwork, register_network


@register_network("tiny_of_a_plugin")
def tiny(spec):
    return StagedNetwork(spec, {"stem": nn.Conv2d(3, 4, 1)}, 4)


@register_term("nothing_of_a_plugin")
class Nothing(Term):
    pass


TERMS.names()  # asks for plugins while they are imported
"""


SCANS = """
from ekd_lightning.data.catalog import read_digits, register_dataset

register_dataset("scans_of_a_plugin")(lambda root, download: read_digits())
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package with a plugin, as pip leaves it in a folder that Python searches."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(errors, "loaded_plugins", {})
    monkeypatch.setattr(registry, "NETWORKS", copy.copy(registry.NETWORKS))
    monkeypatch.setattr(terms, "TERMS", copy.copy(terms.TERMS))
    errors._searched.clear()

    def make(folder, name, source=PLUGIN):
        info = folder / f"{name}-1.5.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[ekd_lightning.plugins]\nmine = {name}_parts\n")
        (folder / f"{name}_parts.py").write_text(source)
        sys.path.insert(0, str(folder))
        return f"{name}_parts"

    yield make
    for name in [name for name in sys.modules if name.endswith("_of_a_test_parts")]:
        sys.modules.pop(name)
    errors._searched.clear()


def tiny():
    return build_network(NetworkSpec("tiny_of_a_plugin", 3, normalization("unit")))


@pytest.mark.parametrize(
    "first",
    [
        lambda: import_user_modules([]),
        tiny,
        lambda: "x" in terms.TERMS.names(),
        lambda: terms.TERMS["nothing_of_a_plugin"],
    ],
    ids=["commands", "network", "names", "term"],
)
def test_an_installed_package_adds_parts_and_is_on_record(package, tmp_path, first):
    """Commands import it at once, Python when a name is asked for that the package has not."""
    module = package(tmp_path / "site", "good_of_a_test")
    terms.TERMS["ce_ensemble"]
    assert module not in sys.modules
    first()
    assert tiny().num_features == 4
    assert "nothing_of_a_plugin" in terms.TERMS.names()
    assert errors.loaded_plugins == {module: "good_of_a_test 1.5"}
    with pytest.raises(UserError, match="is not among imports"):
        build_network(NetworkSpec(f"module:{module}.tiny", 3, normalization("unit")))


def test_the_provenance_names_plugins(monkeypatch):
    monkeypatch.setitem(errors.loaded_plugins, "their_parts", "theirs 2.0")
    assert provenance()["plugins"] == {"their_parts": "theirs 2.0"}


@pytest.mark.parametrize("place", ["working directory", "start"])
def test_a_package_in_a_folder_in_which_one_works_is_not_installed(package, tmp_path, monkeypatch, place):
    module = package(tmp_path / "given", "given_of_a_test", "raise SystemExit('executed')")
    if place == "start":
        monkeypatch.setenv(STARTED_IN, str(tmp_path / "given"))
    else:
        monkeypatch.chdir(tmp_path / "given")
        sys.path.insert(0, "")
    import_user_modules([])
    assert module not in sys.modules
    assert errors.loaded_plugins == {}


def test_a_plugin_that_cannot_be_imported_is_named(package, tmp_path):
    package(tmp_path / "site", "broken_of_a_test", "import no_such_module_here")
    with pytest.raises(UserError, match="plugin 'mine' of the package broken_of_a_test cannot be imported"):
        import_user_modules([])


def test_data_and_bench_know_installed_packages(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalog, "DATASETS", copy.copy(catalog.DATASETS))
    module = package(tmp_path / "site", "scans_of_a_test", SCANS)
    data.main(["scans_of_a_plugin", "--root", str(tmp_path)])
    assert "1,437 for training" in capsys.readouterr().out
    errors._searched.clear()
    errors.loaded_plugins.clear()
    with pytest.raises(UserError, match="does not mix images"):  # before it prepares anything
        make_bench(["recipe.mixup=0.2"], epochs=1, minutes=None)
    assert errors.loaded_plugins == {module: "scans_of_a_test 1.5"}
