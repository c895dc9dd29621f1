"""Networks of timm, torchvision and the user: cut into stages, they compute what the library computes."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torchvision import models

from ekd_lightning.errors import UserError
from ekd_lightning.evaluation.efficiency import count_macs, count_parameters
from ekd_lightning.methods import TermContext, build_method
from ekd_lightning.networks import (
    BranchedStudent,
    NetworkSpec,
    TeacherEnsemble,
    TeacherIdentity,
    build_network,
    load_student,
    normalization,
    register_network,
    registry,
    save_student,
    state_sha256,
)
from ekd_lightning.networks import library as libraries
from ekd_lightning.networks.cutting import UNKNOWN_LOGIT, cut, unknown_classes
from ekd_lightning.networks.frozen import FrozenNetwork, FrozenStudent
from ekd_lightning.networks.library import allow_module, from_hub, usual
from ekd_lightning.networks.library_weights import load_library_network, positions
from ekd_lightning.networks.staged import GlobalPool, StagedNetwork, he_initialised
from ekd_lightning.networks.weights import answers_sha256
from ekd_lightning.settings import RecipeSettings
from ekd_lightning.training.distiller import Distiller

UNIT = normalization("unit")
SMALL = "timm:mobilenetv3_small_050"
FAMILIES = {  # network -> side in pixels
    "timm:resnet18": 64,
    "timm:mobilenetv3_small_050": 64,
    "timm:efficientnet_b0": 64,
    "timm:regnety_002": 64,
    "timm:convnext_atto": 64,
    "timm:vit_tiny_patch16_224": 224,
    "timm:swin_tiny_patch4_window7_224": 224,
    "torchvision:resnet18": 64,
    "torchvision:mobilenet_v3_small": 64,
    "torchvision:regnet_y_400mf": 64,
    "torchvision:densenet121": 64,
    "torchvision:shufflenet_v2_x0_5": 64,
}
STAGED = ("resnet", "mobilenet", "efficientnet", "regnet", "convnext")


def original(name, classes=10, **options):
    library, _, own = name.partition(":")
    if library == "timm":
        return timm.create_model(own, num_classes=classes, **options)
    return models.get_model(own, weights=None, num_classes=classes, **options)


def twins(name, spec=None):
    """The library's module, and ours of the same draw, both for inference."""
    torch.manual_seed(0)
    module = original(name).eval()
    torch.manual_seed(0)
    return module, build_network(spec or NetworkSpec(name, 10, UNIT)).eval()


OWN_SIZES = [pytest.param(name, None, marks=pytest.mark.slow) for name, size in FAMILIES.items() if size == 64]


@pytest.mark.parametrize(("name", "size"), [*FAMILIES.items(), *OWN_SIZES])
@torch.no_grad()
def test_a_network_computes_what_its_library_computes(name, size):
    module, network = twins(name)
    size = size or usual(name).image_size
    images = torch.rand(2, 3, size, size)
    outputs = network.outputs(images)
    assert torch.equal(outputs.logits, module(images))
    assert torch.equal(network(images), outputs.logits)
    assert count_parameters(network) == sum(parameter.numel() for parameter in module.parameters())
    assert outputs.pooled.shape == (2, network.num_features)
    if name.startswith("timm"):
        features = module.forward_head(module.forward_features(images), pre_logits=True)
        assert torch.equal(outputs.pooled, features)
    if any(family in name for family in STAGED):
        assert network.stage_names[-3:] == ("stage2", "stage3", "stage4")
        sizes = [maps.shape[-1] for maps in outputs.stages.values()]
        assert sizes == sorted(sizes, reverse=True)
        if name.startswith("timm"):
            assert torch.equal(list(outputs.stages.values())[-1], module.forward_features(images))
    frozen = FrozenNetwork(network, stage_names=network.stage_names)
    found = frozen.named(frozen(images))
    torch.testing.assert_close(found.logits, outputs.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.stages, outputs.stages, rtol=1e-3, atol=1e-4)


QUICK = ("timm:resnet18", SMALL)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in FAMILIES
        if any(family in name for family in STAGED)
    ],
)
def test_students_are_cut_from_networks_of_libraries(name, tmp_path):
    torch.manual_seed(0)
    student = BranchedStudent(NetworkSpec(name, 10, UNIT), branches=2, split_after="stage3").eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        outputs = student.outputs(images)
        torch.testing.assert_close(FrozenStudent(student)(images), outputs.logits, rtol=1e-4, atol=1e-4)
    assert [list(stages) for stages in outputs.stages] == [list(student.stage_names)] * 2
    trunk, branches = count_parameters(student.trunk), [count_parameters(branch) for branch in student.branches]
    assert branches[0] == branches[1]
    assert trunk + branches[0] == count_parameters(original(name))
    assert count_macs(student, 64) > count_macs(student, 32) > 0
    save_student(tmp_path / "student.safetensors", student)
    again = load_student(tmp_path / "student.safetensors")
    assert state_sha256(again) == state_sha256(student)
    assert torch.equal(again(images), outputs.logits)


def test_a_plain_student_learns_as_the_library_s_module_does():
    module, _ = twins(SMALL)
    torch.manual_seed(0)
    student = BranchedStudent(NetworkSpec(SMALL, 10, UNIT), branches=1, split_after="none").train()
    images, labels = torch.rand(8, 3, 64, 64), torch.arange(8)
    for network in (module.train(), student):
        nn.functional.cross_entropy(network(images), labels).backward()
    theirs = [parameter.grad for parameter in module.parameters()]
    ours = [parameter.grad for parameter in student.parameters()]
    assert sum(bool(one is not None) for one in ours) == len(theirs)
    assert sorted(float(one.abs().sum()) for one in ours) == pytest.approx(
        sorted(float(one.abs().sum()) for one in theirs), rel=1e-4
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (SMALL, {"drop_rate": 0.5}),
        ("timm:resnet10t", {"drop_rate": 0.5}),
        ("timm:efficientnet_b0", {"drop_rate": 0.5}),
        ("timm:ghostnet_050", {}),  # drops 0.2 of its own
    ],
)
@torch.no_grad()
def test_dropout_of_the_library_s_forward_pass_acts_in_training(name, options):
    module = original(name, **options)
    network = build_network(NetworkSpec(name, 10, UNIT, options))
    students = BranchedStudent(NetworkSpec(name, 10, UNIT, options), branches=1, split_after="none")
    state = module.state_dict()
    for part in (*network.stages.values(), network.neck):
        part.load_state_dict({key: state[key] for key in part.state_dict()})
    head = f"{[key for key, part in module.named_modules() if isinstance(part, nn.Linear)][-1]}."
    network.head.load_state_dict({key: state[head + key] for key in ("weight", "bias")})
    images = torch.rand(4, 3, 64, 64)

    def passes(one, training):
        torch.manual_seed(0)
        return one.train(training)(images), one(images)

    for training in (True, False):  # so that batch norm has seen the same
        ours, theirs = passes(network, training), passes(module, training)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(*ours) != training
    assert not torch.equal(*passes(students, True))
    assert torch.equal(*passes(students, False))


@torch.no_grad()
def test_images_are_brought_to_the_network_s_own_size_and_statistics():
    known = usual("timm:resnet18")
    assert (known.image_size, known.normalization) == (224, normalization("imagenet"))
    assert usual("torchvision:inception_v3").image_size == 299
    module, network = twins("timm:resnet18", NetworkSpec("timm:resnet18", 10, known.normalization, {}, 48))
    images = torch.rand(2, 3, 32, 40)
    large = nn.functional.interpolate(images, (48, 48), mode="bilinear", antialias=True)
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (known.normalization.mean, known.normalization.std)
    )
    expected = module((large - mean) / std)
    assert torch.equal(network(images), expected)
    torch.testing.assert_close(FrozenNetwork(network)(images)[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(network(large), expected)  # images of that size are left alone


def test_weights_come_in_the_library_s_own_form(tmp_path):
    torch.manual_seed(1)
    module = original(SMALL).eval()
    images = torch.rand(2, 3, 64, 64)
    safetensors.torch.save_file(module.state_dict(), tmp_path / "plain.safetensors")
    wrapped = {f"module.{name}": value for name, value in module.state_dict().items()}
    torch.save({"model_state_dict": wrapped, "epoch": 3}, tmp_path / "wrapped.pth")
    torch.save({"mine": {"weights": module.state_dict()}, "epoch": 3}, tmp_path / "own.pth")
    spec = NetworkSpec(SMALL, 10, UNIT)
    for file, key in (("plain.safetensors", None), ("wrapped.pth", None), ("own.pth", "mine.weights")):
        network = load_library_network(spec, tmp_path / file, state_key=key)
        assert torch.equal(network(images), module(images))
        assert not network.training
    with pytest.raises(UserError, match=r"own.pth: holds values that are not tensors: mine, epoch; .* state_key=KEY"):
        load_library_network(spec, tmp_path / "own.pth")
    with pytest.raises(UserError, match=r"own.pth: key 'mine.wieghts'.*allowed: weights"):
        load_library_network(spec, tmp_path / "own.pth", state_key="mine.wieghts")


def test_weights_of_another_network_are_named(tmp_path):
    safetensors.torch.save_file(original("timm:resnet18").state_dict(), tmp_path / "r18.safetensors")
    with pytest.raises(UserError) as refused:
        load_library_network(NetworkSpec(SMALL, 10, UNIT), tmp_path / "r18.safetensors")
    line = str(refused.value)
    assert "missing: conv_stem.weight, " in line
    assert "unexpected: " in line
    assert " more" in line


VIT = "timm:vit_tiny_patch16_224"


def test_a_network_of_a_fixed_size_refuses_others_by_name():
    said = r"vit_tiny_patch16_224' accepts only images of 224×224 pixels, not {0}×{0}: set image_size=224 to resize"
    with pytest.raises(UserError, match=said.format(64)):
        build_network(NetworkSpec(VIT, 10, UNIT, {"depth": 1}, 64))
    spec = NetworkSpec(VIT, 10, UNIT, {"depth": 1})
    student = BranchedStudent(spec, branches=1, split_after="none")
    small = BranchedStudent(NetworkSpec("resnet8", 10, UNIT), branches=1, split_after="none")
    for made in (lambda: TermContext.of(student), lambda: TermContext.of(small, [build_network(spec)])):
        with pytest.raises(UserError, match=said.format(32)):
            made()
    assert TermContext.of(student, image_size=224).num_branches == 1
    with pytest.raises(UserError, match="accepts only images of 224×224 pixels, not 32×48"):
        student.stage_shapes((32, 48))


@pytest.mark.parametrize(
    ("options", "size", "image_size"),
    [
        ({}, None, 224),
        ({}, 224, 32),
        ({"img_size": 32}, None, 32),
        ({"img_size": [48, 48]}, 48, 32),
        ({"dynamic_img_size": True}, None, 48),
        ({"dynamic_img_size": True}, 48, 32),
    ],
)
@torch.no_grad()
def test_a_network_of_a_fixed_size_takes_images_that_fit_it(options, size, image_size):
    spec = NetworkSpec(VIT, 10, UNIT, {"depth": 1, **options}, size)
    student = BranchedStudent(spec, branches=1, split_after="none").eval()
    assert student.stage_shapes(image_size) == {}
    assert student(torch.rand(2, 3, image_size, image_size)).shape == (2, 10)


def test_a_gate_is_made_for_a_network_of_a_fixed_size():
    spec = NetworkSpec("torchvision:maxvit_t", 10, UNIT)
    student = BranchedStudent(spec, branches=2, split_after="stem", ensemble="gate")
    assert student.gate.fc.in_features == student.stage_shapes(224)["stem"][0]


@torch.no_grad()
def test_classes_are_those_of_the_data(tmp_path):
    torch.manual_seed(2)
    module = original(SMALL, classes=5).eval()
    safetensors.torch.save_file(module.state_dict(), tmp_path / "w.safetensors")
    images = torch.rand(2, 3, 64, 64)
    logits = module(images).detach()

    def load(classes, names=("cat", "dog", "owl"), **others):
        spec = NetworkSpec(SMALL, len(names), UNIT)
        chosen = None if classes is None else positions(spec, classes, names, 5)
        return load_library_network(spec, tmp_path / "w.safetensors", classes=chosen, **others)

    torch.testing.assert_close(load([4, 0, 2])(images), logits[:, [4, 0, 2]])
    by_name = load(["Owl", "ant", "dog", "bee", "cat"])
    torch.testing.assert_close(by_name(images), logits[:, [4, 2, 0]])
    partial = load(["owl", "ant", "dog", "bee", "elk"])(images)
    torch.testing.assert_close(partial[:, 1:], logits[:, [2, 0]])
    assert torch.equal(partial[:, 0], torch.full((2,), UNKNOWN_LOGIT))
    assert torch.equal(partial.softmax(1)[:, 0], torch.zeros(2))
    for wrong, said in (
        ([0, 1], "must be 3 positions in 0 .. 4"),
        ([0, 1, 5], "must be 3 positions in 0 .. 4"),
        (["cat", "dog"], "names 2 classes, but its weights predict 5"),
        (["a", "b", "c", "d", "e"], "none of its classes"),
        (None, "predicts 5 classes, the data has 3.*classes=.*finetune=head"),
    ):
        with pytest.raises(UserError, match=said):
            load(wrong)
    head = load(None, fresh_head=True).head
    assert head.weight.shape == (3, module.classifier.in_features)


def knowing(tmp_path, classes):
    """A teacher of four classes that takes them from weights of three."""
    path = tmp_path / "three.safetensors"
    torch.manual_seed(0)
    safetensors.torch.save_file(original(SMALL, classes=3).state_dict(), path)
    return load_library_network(NetworkSpec(SMALL, 4, UNIT), path, classes=classes)


def methods_for(teachers, terms, assignment=None):
    """The method, built when the teachers are there, and before, as runs do; then a distiller meets them."""
    student = BranchedStudent(NetworkSpec("resnet8", 4, UNIT), branches=2, split_after="none")
    ensemble = TeacherEnsemble(teachers, [TeacherIdentity(f"t{m}", "", "file", SMALL) for m in range(len(teachers))])
    names = tuple(identity.id for identity in ensemble.identities)

    def distill(networks):
        context = TermContext.of(student, networks, teacher_names=names)
        method = build_method("m", terms, context, assignment=assignment)
        return Distiller(student, method, RecipeSettings(epochs=1), teachers=ensemble)

    fresh = [build_network(NetworkSpec(SMALL, 4, UNIT)) for _ in teachers]
    return lambda: distill(teachers), lambda: distill(fresh)


@pytest.mark.parametrize(
    ("terms", "remedy"),
    [
        ({"kd_ensemble": {"weight": 1, "loss": "mse_logits"}}, "use loss=kl"),
        ({"kd_branch": {"weight": 1, "loss": "mse_logits"}}, "use loss=kl"),
        ({"kd_standardized": {"weight": 1}}, "use kd_branch in its place"),
    ],
)
def test_terms_of_plain_logits_refuse_a_teacher_that_does_not_know_a_class(tmp_path, terms, remedy):
    teachers = [knowing(tmp_path, [2, 1, 0, 0]), knowing(tmp_path, [2, -1, 0, -1])]
    assert [unknown_classes(teacher.head) for teacher in teachers] == [frozenset(), frozenset({1, 3})]
    assert unknown_classes(teachers[1].head.bfloat16()) == {1, 3}
    teachers[1].float()
    said = rf"method.terms.{next(iter(terms))} compares the logits of all classes, and the teacher 't1' .*{remedy}"
    for distill in methods_for(teachers, terms):
        with pytest.raises(UserError, match=said):
            distill()
    with pytest.raises(UserError, match=said):
        methods_for(teachers, terms, "mean")[1]()
    methods_for(teachers[:1], terms)[1]()


CE = {"ce_ensemble": {"weight": 1}}


@pytest.mark.parametrize(
    ("terms", "assignment", "named"),
    [
        ({"feature_branch": {"weight": 1}, "attention": {"weight": 1, "stages": ["stage2"]}}, None, None),
        ({"vid": {"weight": 1, "stages": ["stage2"]}, "similarity": {"weight": 1}}, "mean", None),
        ({"kd_branch": {"weight": 1}, "feature_branch": {"weight": 1}}, [[1, 0], [1, 0]], None),
        ({"kd_branch": {"weight": 0}, "feature_branch": {"weight": 1}}, None, None),
        ({"kd_ensemble": {"weight": 1}, "kd_branch": {"weight": 1}}, None, "kd_ensemble, method.terms.kd_branch,"),
        ({"kd_branch": {"weight": 1, "loss": "mse_logits"}}, "random", "kd_branch,"),
        ({"feature_camkd": {"weight": 1}}, None, "feature_camkd,"),
        ({"boundary": {"weight": 1}}, None, "boundary,"),
    ],
)
def test_a_teacher_of_no_class_teaches_features_alone(tmp_path, terms, assignment, named):
    teachers = [knowing(tmp_path, [2, 1, 0, 0]), knowing(tmp_path, [-1] * 4)]
    for distill in methods_for(teachers, CE | terms, assignment):
        if named is None:
            distill()
            continue
        said = rf"the teacher 't1' does not predict the data's 4 classes, .* remove method.terms.{named}"
        with pytest.raises(UserError, match=said):
            distill()


@pytest.mark.parametrize(
    ("classes", "terms", "assignment", "lost"),
    [
        (([2, 1, 0, 0], [2, -1, 0, 1]), {"kd_ensemble": {"weight": 1}}, None, "[1]"),
        (([2, 1, -1, 0], [2, -1, 0, 1]), {"kd_branch": {"weight": 1}}, "mean", "[1, 2]"),
        (([2, 1, 0, 0], [2, -1, 0, 1]), {"dkd": {"weight": 1}}, "mean", "[1]"),
        (([2, 1, 0, 0], [2, -1, 0, 1]), {"kd_branch": {"weight": 1}}, "one_to_one", None),
        (([2, 1, 0, 0], [2, -1, 0, 1]), {"kd_branch": {"weight": 1}}, "random", None),
        (([2, -1, 0, 0], [2, -1, 0, 1]), {"kd_ensemble": {"weight": 1}}, None, None),  # nobody knows it
        (([2, 1, 0, 0], [2, -1, 0, 1]), {"kd_ensemble": {"weight": 1, "combine": "probabilities"}}, None, None),
        (([2, 1, 0, 0], [2, -1, 0, 1]), {"kd_ebkd": {"weight": 1}}, None, None),
    ],
)
def test_a_mean_of_logits_that_rules_a_class_out_is_told_once(tmp_path, classes, terms, assignment, lost):
    teachers = [knowing(tmp_path, one) for one in classes]
    for distill in methods_for(teachers, terms, assignment):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            distill()
        found = [str(one.message) for one in told if "gives them probability 0" in str(one.message)]
        assert len(found) == (lost is not None)
        assert all(f"classes {lost} are known to some teachers only" in line for line in found)


class Residual(nn.Module):
    """Traceable, without a linear end where `linear` is false."""

    def __init__(self, linear=True):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.second = nn.Conv2d(8, 8, 3, 2, 1)
        self.last = nn.Linear(8, 10)
        self.linear = linear

    def forward(self, images):
        maps = self.first(images)
        maps = torch.relu(self.second(maps)) + maps[:, :, ::2, ::2]
        logits = self.last(maps.mean((2, 3)))
        return logits if self.linear else logits * 2


class Moody(Residual):
    """Its path depends on the data, so it cannot be traced."""

    def forward(self, images):
        return super().forward(images) if images.mean() > 0.5 else super().forward(images) + 1


@pytest.fixture
def users(monkeypatch):
    module: Any = types.ModuleType("users_networks")

    def failing():
        raise RuntimeError("no weights")

    module.residual, module.moody, module.table, module.failing = Residual, Moody, lambda: {}, failing
    for made in (Residual, Moody, module.table, failing):
        monkeypatch.setattr(made, "__module__", "users_networks")
    module.system = os.system
    module.Linear = nn.Linear
    monkeypatch.setitem(sys.modules, "users_networks", module)
    monkeypatch.setattr(libraries, "_allowed", set())
    allow_module("users_networks")


def test_a_users_module_is_a_network_as_it_is(users):
    torch.manual_seed(0)
    plain = Residual()
    torch.manual_seed(0)
    network = build_network(NetworkSpec("module:users_networks.residual", 10, UNIT))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(network(images), plain(images))
    assert network.stage_names == ("stem", "stage1")
    assert network.num_features == 8
    with pytest.raises(UserError, match=r"module 'elsewhere' is not among imports: add imports=\[elsewhere\]"):
        build_network(NetworkSpec("module:elsewhere.residual", 10, UNIT))
    with pytest.raises(UserError, match="did you mean 'residual'"):
        build_network(NetworkSpec("module:users_networks.residuals", 10, UNIT))
    with pytest.raises(UserError, match=r"its function returned a dict, not a torch.nn.Module"):
        build_network(NetworkSpec("module:users_networks.table", 10, UNIT))
    with pytest.raises(UserError, match=r"its function raised RuntimeError: no weights \(test_library.py, line \d+\)"):
        build_network(NetworkSpec("module:users_networks.failing", 10, UNIT))


def test_a_users_function_is_run_for_real_alone(users, tmp_path, monkeypatch):
    devices = []

    def make():
        module = Residual()
        devices.append(module.last.weight.device.type)
        return module

    monkeypatch.setattr(make, "__module__", "users_networks", raising=False)
    monkeypatch.setattr("users_networks.make", make, raising=False)
    module = Residual().eval()
    safetensors.torch.save_file(module.state_dict(), tmp_path / "w.safetensors")
    network = load_library_network(NetworkSpec("module:users_networks.make", 10, UNIT), tmp_path / "w.safetensors")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(network(images), module(images))
    assert devices == ["cpu"]


@pytest.mark.parametrize(
    "name",
    [
        "module:os.system",
        "module:subprocess.run",
        "module:builtins.eval",
        "module:ekd_lightning.files.os.system",
        "module:users_networks.system",  # reachable there, but defined elsewhere
        "module:users_networks.os.system",
        "module:users_networks.Linear",
        "module:users_networksx.residual",
        "module:system",
        "module:",
    ],
)
def test_a_file_that_names_code_runs_none(users, tmp_path, name):
    """A network's description lies in weight files and records: it may call what the user has allowed alone."""
    mark = tmp_path / "ran"
    options = {"command": f"touch {mark}", "args": ["touch", str(mark)]}
    with pytest.raises(UserError, match=r"is not among imports|unknown function of module"):
        build_network(NetworkSpec(name, 10, UNIT, options))
    student = BranchedStudent(NetworkSpec("resnet8", 10, UNIT), branches=1, split_after="none")
    save_student(tmp_path / "s.safetensors", student)
    content = (tmp_path / "s.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    described = json.loads(header["__metadata__"]["ekd_spec"])
    described["spec"] |= {"name": name, "options": options}
    metadata = {"ekd_kind": "student", "ekd_spec": json.dumps(described)}
    safetensors.torch.save_file(safetensors.torch.load(content), tmp_path / "evil.safetensors", metadata)
    with pytest.raises(UserError, match=r"is not among imports|unknown function of module"):
        load_student(tmp_path / "evil.safetensors")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["module:users_networks.moody", "module:users_networks.residual"])
def test_a_module_without_pooled_features_serves_logits_alone(users, name):
    options = {} if name.endswith("moody") else {"linear": False}
    network = build_network(NetworkSpec(name, 10, UNIT, options)).eval()
    assert network.num_features == 0
    images = torch.rand(2, 3, 32, 32)
    assert network.outputs(images).logits.shape == (2, 10)
    assert count_macs(network) == count_macs(build_network(NetworkSpec("module:users_networks.residual", 10, UNIT)))
    own = BranchedStudent(network.spec, branches=2, split_after="none")
    assert own.stage_shapes() == network.stage_shapes()
    student = BranchedStudent(NetworkSpec("resnet8", 10, UNIT), branches=1, split_after="none")
    context = TermContext.of(student, [network], teacher_names=("theirs",))
    build_method("m", {"kd_ensemble": {"weight": 1}}, context)
    with pytest.raises(UserError, match=r"the teacher 'theirs' does not end with a linear layer.*no pooled features"):
        build_method("m", {"feature_branch": {"weight": 1, "feature": "pooled"}}, context)
    if name.endswith("moody"):
        with pytest.raises(UserError, match="the teacher 'theirs' has no stage"):
            build_method("m", {"feature_branch": {"weight": 1, "feature": "last", "adapter": "project"}}, context)


def test_stages_are_named_by_submodules():
    spec = NetworkSpec("timm:resnet18", 10, UNIT, {"stages": {"early": "layer1", "last": "layer4"}})
    network = build_network(spec).eval()
    assert network.stage_names == ("early", "last")
    assert network.stage_shapes(64) == {"early": (64, 16, 16), "last": (512, 2, 2)}
    for stages, said in (
        ({"x": "layer9"}, "did you mean 'layer4'"),
        ({"x": "layer1.0.conv1"}, "cannot be cut after 'layer1.0.conv1'"),
        ({"b": "layer2", "a": "layer1"}, "not in the order"),
    ):
        with pytest.raises(UserError, match=said):
            build_network(NetworkSpec("timm:resnet18", 10, UNIT, {"stages": stages}))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("timm:resnet19", {}, r"unknown network of timm: 'resnet19'; did you mean"),
        ("torchvision:resnet19", {}, "unknown network of torchvision: 'resnet19'; did you mean 'resnet18'"),
        ("timm:resnet18", {"colour": 1}, "'timm:resnet18' cannot be built with options {'colour': 1}"),
        ("tim:resnet18", {}, "unknown network 'tim:resnet18'"),
        ("timm:resnet18", {"checkpoint_path": "evil.pt"}, "option checkpoint_path is refused"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "option weights is refused"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, options, said):
    with pytest.raises(UserError, match=said):
        build_network(NetworkSpec(name, 10, UNIT, options))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"timm is not installed: pip install 'ekd-lightning\[timm\]'"):
        build_network(NetworkSpec("timm:resnet18", 10, UNIT))
    with pytest.raises(UserError, match=r"huggingface_hub is not installed: pip install 'ekd-lightning\[hub\]'"):
        from_hub("user/repo")


def test_hub_repositories_are_read_as_safetensors(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    module = original(SMALL).eval()
    safetensors.torch.save_file(module.state_dict(), tmp_path / "model.safetensors")
    described = {
        "architecture": "mobilenetv3_small_050",
        "pretrained_cfg": {"mean": [0.5] * 3, "input_size": [3, 96, 96]},
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    asked = []

    def fetch(repository, file, revision):
        asked.append(file)
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    name, known, path = from_hub("user/repo")
    assert (name, known.image_size, known.normalization.mean) == (SMALL, 96, (0.5, 0.5, 0.5))
    assert asked == ["config.json", "model.safetensors"]
    network = load_library_network(NetworkSpec(SMALL, 10, UNIT), path)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(network(images), module(images))
    for text, named in {"[]": "damaged, not a mapping", "[" * 100_000: "damaged, not JSON", "{}": "names no"}.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=rf"config\.json.*{named}"):
            from_hub("user/repo")
    for mean in ([10**400] * 3, [math.inf] * 3, "x", [0.5]):
        (tmp_path / "config.json").write_text(json.dumps({**described, "pretrained_cfg": {"mean": mean}}))
        with pytest.raises(UserError, match=r"'user/repo': its config\.json: normalization: mean"):
            from_hub("user/repo")
    for odd in ([1], {"input_size": 96}, {"input_size": [3, 96]}, {"input_size": [3, "96", 96]}):
        (tmp_path / "config.json").write_text(json.dumps({**described, "pretrained_cfg": odd}))
        with pytest.raises(UserError, match=r"'user/repo': its config\.json: lacks a pretrained_cfg with an input"):
            from_hub("user/repo")
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(UserError, match=r"hub repository 'user/repo': config.json cannot be fetched \(no route\)"):
        from_hub("user/repo")


def test_answers_depend_on_the_version_of_a_library_and_weights_do_not(monkeypatch, tmp_path):
    _, network = twins(SMALL)
    before, known = answers_sha256("0" * 64, SMALL), state_sha256(network)
    monkeypatch.setattr("ekd_lightning.networks.registry.version", lambda name: "99+cpu")
    other = answers_sha256("0" * 64, SMALL)
    assert other != before
    monkeypatch.setattr("ekd_lightning.networks.registry.version", lambda name: "99+cu128")
    assert answers_sha256("0" * 64, SMALL) == other
    assert state_sha256(network) == known
    assert answers_sha256("0" * 64, "resnet8") == "0" * 64
    module = types.ModuleType("users_code")
    module.__file__ = str(tmp_path / "users_code.py")
    monkeypatch.setitem(sys.modules, "users_code", module)
    found = set()
    for code in ("a = 1", "a = 2"):
        Path(module.__file__).write_text(code)
        found.add(answers_sha256("0" * 64, "module:users_code.f"))
    assert len(found) == 2


def test_a_registered_network_keeps_the_weights_it_is_given():
    convolution = nn.Conv2d(3, 4, 3)
    given = convolution.weight.detach().clone()

    @register_network("kept_as_given")
    def build(spec):
        return StagedNetwork(spec, {"stem": convolution}, num_features=4)

    network = build_network(NetworkSpec("kept_as_given", 10, UNIT))
    assert torch.equal(network.stages["stem"].weight, given)
    assert not torch.equal(he_initialised(network).stages["stem"].weight, given)


def test_a_registered_builder_may_return_any_module(monkeypatch):
    monkeypatch.setattr(registry, "NETWORKS", copy.copy(registry.NETWORKS))
    made = []

    @register_network("plain_module")
    def build(spec, *, width=8):
        convolutions = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 16, 3, 2, 1))
        made.append(nn.Sequential(convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, spec.num_classes)))
        return made[-1]

    spec = NetworkSpec("plain_module", 10, UNIT, {"width": 4})
    network, images = build_network(spec), torch.rand(2, 3, 32, 32)
    assert torch.equal(network(images), made[-1](images))
    assert (len(network.stage_names), network.num_features, network.training) == (2, 16, True)
    student = BranchedStudent(spec, branches=2, split_after=network.stage_names[0])
    assert student.outputs(images).branch_logits.shape == (2, 2, 10)


def test_what_a_registered_builder_may_not_return_is_told(monkeypatch):
    monkeypatch.setattr(registry, "NETWORKS", copy.copy(registry.NETWORKS))
    made: Any = lambda spec: [nn.Linear(3, 10)]  # noqa: E731
    register_network("no_module")(made)
    with pytest.raises(UserError, match="network 'no_module': its builder returned a list, not a torch"):
        build_network(NetworkSpec("no_module", 10, UNIT))
    register_network("seven_classes")(lambda spec: nn.Sequential(nn.Conv2d(3, 4, 3), GlobalPool(), nn.Linear(4, 7)))
    with pytest.raises(UserError, match=r"'seven_classes' predicts 7 classes instead of 10; .* spec\.num_classes"):
        build_network(NetworkSpec("seven_classes", 10, UNIT))


def test_cutting_shares_the_module_s_parts():
    module = original("timm:resnet18")
    parts = cut(module)
    assert parts.head is module.fc
    assert parts.stages["stage1"].get_submodule("layer1.0") is module.layer1[0]
    assert module.training
