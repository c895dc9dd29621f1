"""Networks of the user: plain modules as teachers, and what is told of those that return no logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from ekd_lightning.data import ImageSet
from ekd_lightning.errors import UserError
from ekd_lightning.evaluation.predict import predict
from ekd_lightning.methods import TermContext, build_method
from ekd_lightning.networks import BranchedStudent, NetworkSpec, TeacherEnsemble, build_network, normalization
from ekd_lightning.networks.own import as_staged, check_outputs
from ekd_lightning.networks.spec import NORMALIZATIONS, Normalization

SPEC = NetworkSpec("resnet8", 4, normalization("unit"))
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def plain(classes: int = 4) -> nn.Sequential:
    norm = nn.BatchNorm2d(6)
    norm.get_buffer("running_mean").uniform_()
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes)
    )


class Wrapping(nn.Module):
    """Passes what a function makes of the images and the logits of a plain network."""

    def __init__(self, forward, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network, self.made = network or plain(), forward

    def forward(self, images):
        return self.made(images, self.network)


def by_brightness(images, network):
    return network(images if images.mean() > 2 else images * 1)  # torch.fx cannot follow it


def no_logits(images, network):
    by_brightness(images, network)
    return {"logits": network(images)}


def failing(images, network):
    raise RuntimeError("not now")


@pytest.mark.parametrize(("size", "stages"), [(32, ("stem",)), (20, ())])
def test_a_network_of_one_image_size_keeps_its_classifier(size, stages):
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(size * size, 4))
    (network,) = TeacherEnsemble([layers], normalization="unit").members
    assert (network.stage_names, network.num_features, network.spec.num_classes) == (stages, size * size, 4)
    images = torch.rand(2, 3, size, size)
    assert torch.equal(network(images), layers(images))


@pytest.mark.parametrize("statistics", ["unit", "imagenet", Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))])
@pytest.mark.parametrize("wrapped", [None, by_brightness])
def test_a_plain_module_teaches_what_it_computes(statistics, wrapped):
    module = plain() if wrapped is None else Wrapping(wrapped)
    teachers = TeacherEnsemble([module], normalization=statistics, num_classes=None if wrapped is None else 4)
    own = NORMALIZATIONS[statistics] if isinstance(statistics, str) else statistics
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (own.mean, own.std))
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(teachers(IMAGES).logits[0], module((IMAGES - mean) / std))
    assert teachers.members[0].num_features == (6 if wrapped is None else 0)


def test_a_module_keeps_its_own_hooks():
    module = plain()
    module.register_forward_hook(lambda own, given, logits: 2 * logits)
    expected = module.eval()(IMAGES)
    torch.testing.assert_close(
        TeacherEnsemble([module], normalization="unit", num_classes=4)(IMAGES).logits[0], expected
    )


def test_a_scripted_module_teaches():
    scripted = torch.jit.script(plain().eval())
    teachers = TeacherEnsemble([scripted], normalization="unit", num_classes=4)
    torch.testing.assert_close(teachers(IMAGES).logits[0], scripted(IMAGES))
    assert not any(parameter.requires_grad for parameter in scripted.parameters())


def test_plain_modules_and_networks_of_this_package_teach_together():
    first, second, third = plain(), build_network(SPEC), plain()
    teachers = TeacherEnsemble([first, second, third], normalization="centered")
    assert [identity.id for identity in teachers.identities] == ["Sequential-0", "resnet8-1", "Sequential-2"]
    assert teachers.members[1] is second
    assert [member.spec.normalization for member in teachers.members] == [
        normalization(name) for name in ("centered", "unit", "centered")
    ]
    teachers.verify()
    with torch.no_grad():
        first[-1].bias.add_(1)
    with pytest.raises(RuntimeError, match="teacher 'Sequential-0' has changed"):
        teachers.verify()


def test_a_module_is_frozen_with_the_parts_that_no_stage_contains():
    module = plain()
    module.add_module("unused", nn.BatchNorm1d(3))
    module.forward = lambda images: nn.Sequential.forward(module[:6], images)
    TeacherEnsemble([module], normalization="unit", num_classes=4)
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def nan_weights() -> nn.Module:
    module = plain()
    nn.init.constant_(module[-1].bias, float("nan"))
    return module


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        (plain, {}, "teachers must be a list of modules, not a Sequential"),
        (lambda: ["resnet8"], {}, "must be a torch.nn.Module that returns logits, not a str"),
        (lambda: [BranchedStudent(SPEC, branches=2, split_after="stem")], {}, "not a BranchedStudent"),
        (lambda: [plain(), plain(5)], {"normalization": "unit"}, "'Sequential-0' has 4, 'Sequential-1' has 5"),
        (lambda: [plain()], {"num_classes": 3}, "num_classes=3: Sequential predicts 4 classes"),
        (lambda: [build_network(SPEC)], {"num_classes": 3}, "num_classes=3: 'resnet8' predicts 4 classes"),
        (lambda: [Wrapping(by_brightness)], {}, "Wrapping does not end with a linear layer: pass num_classes="),
        (lambda: [plain().double()], {}, r"weights of torch.float64, .* convert it by .float\(\)"),
        (lambda: [nan_weights()], {}, "weights that are infinite or NaN"),
        (lambda: [nn.Sequential(nn.LazyConv2d(3, 3))], {}, "lazy layers without weights; run it on images first"),
        (lambda: [Wrapping(lambda images, network: (network(images), images))], {}, "several values .* wrap it"),
        (lambda: [Wrapping(lambda images, network: {"logits": network(images)})], {}, "returns several values"),
        (lambda: [plain()], {}, r"normalization: must be given, .* unit \(images in \[0, 1\] as they are\)"),
        (lambda: [build_network(SPEC), plain()], {"normalization": [None, None]}, "normalization: must be given"),
        (lambda: [plain()], {"normalization": "imagenett"}, "did you mean 'imagenet'"),
        (lambda: [plain()], {"normalization": ["unit", "unit"]}, "has 2 entries for 1 teachers"),
        (lambda: [build_network(SPEC)], {"normalization": "unit"}, "the network 'resnet8' has its own"),
    ],
)
def test_what_cannot_be_a_teacher_is_told(members, options, message):
    with pytest.raises(UserError, match=message):
        TeacherEnsemble(members(), **options)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Wrapping(no_logits), r"teachers\[0\]: network 'Wrapping' returns a dict, not logits \[2, 4\]"),
        (Wrapping(failing), r"fails on images \[2, 3, 16, 16\]: RuntimeError: not now \(test_own.py, line \d+\)"),
        (
            Wrapping(lambda images, network: functional.one_hot(network(images).argmax(1), 4)),
            "values .* of torch.int64",
        ),
        (Wrapping(lambda images, network: network(images).softmax(1)), "returns probabilities, not logits"),
        (Wrapping(by_brightness, plain(5)), r"returns values \[2, 5\] for images .*, not logits \[2, 4\]"),
    ],
)
def test_a_network_without_logits_is_told_before_it_trains(module, message):
    (network,) = TeacherEnsemble([module], normalization="unit", num_classes=4).members
    network.train()
    network.neck.eval()
    modes = [part.training for part in network.modules()]
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=message):
        check_outputs(network, 16, "teachers[0]")
    assert [part.training for part in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trial_changes_nothing():
    student = BranchedStudent(SPEC, branches=2, split_after="stem").train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    check_outputs(student, (16, 12), "student")
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(part.training for part in student.modules())


def test_the_mode_of_every_part_of_a_module_stays_its_own():
    module = plain().train()
    module[1].eval()  # a frozen batch norm
    network = as_staged(module, "unit")
    images = ImageSet("own", "test", (IMAGES * 255).byte(), torch.zeros(3, dtype=torch.long), ("a",))
    predict(network, images, batch_size=2)
    assert [part.training for part in module] == [True, False, True, True, True, True]
    assert network.training


@pytest.mark.parametrize(("terms", "refused"), [("kd_ensemble", True), ("similarity", False)])
def test_a_teacher_of_other_classes_teaches_features_alone(terms, refused):
    teachers, student = (
        TeacherEnsemble([plain(7)], normalization="unit"),
        BranchedStudent(SPEC, branches=1, split_after="stem"),
    )
    context = TermContext.of(student, teachers.members, image_size=16, teacher_names=("seven",))
    settings = {terms: {"weight": 1.0}}
    if not refused:
        assert build_method("x", settings, context).needs_teachers
        return
    with pytest.raises(UserError, match="teacher 'seven' does not predict the data's 4 classes"):
        build_method("x", settings, context)
