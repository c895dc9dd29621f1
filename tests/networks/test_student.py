"""Students with branches, whole and cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from ekd_lightning.errors import UserError
from ekd_lightning.networks import (
    BranchedStudent,
    NetworkSpec,
    StudentOutput,
    build_network,
    cut_branches,
    fold_branches,
    normalization,
)
from ekd_lightning.networks.student import ENSEMBLES

SPLITS = {
    "resnet8": ("none", "stem", "stage1", "stage2", "stage3"),
    "wrn_16_1": ("none", "stem", "stage1", "stage2", "stage3"),
    "densenetbc_40_12": ("none", "stage1", "stage3"),
    "vgg8": ("none", "stage2", "stage4"),
    "mobilenetv2": ("none", "stage1", "stage4"),
}


def _spec(name: str = "resnet8", **options: Any) -> NetworkSpec:
    return NetworkSpec(name, 10, normalization("cifar10"), options)


def _student(name: str = "resnet8", seed: int = 0, **arguments: Any) -> BranchedStudent:
    torch.manual_seed(seed)
    return BranchedStudent(_spec(name), **{"branches": 3, "split_after": "stage1", **arguments})


def _outputs(student: BranchedStudent, images: torch.Tensor) -> StudentOutput:
    with torch.no_grad():
        return student.eval().outputs(images)


@pytest.mark.parametrize("split_after", SPLITS["resnet8"])
def test_shapes_and_shared_stages(split_after: str) -> None:
    student = _student(split_after=split_after)
    images = torch.rand(2, 3, 32, 32)
    outputs = _outputs(student, images)
    assert (student.num_branches, student.split_after, student.num_classes) == (3, split_after, 10)
    assert outputs.logits.shape == (2, 10)
    assert outputs.branch_logits.shape == (3, 2, 10)
    assert outputs.pooled.shape == (3, 2, student.num_features)
    shapes = student.stage_shapes()
    shared = [] if split_after == "none" else student.stage_names[: student.stage_names.index(split_after) + 1]
    for stages in outputs.stages:
        assert tuple(stages) == student.stage_names
        assert {name: tuple(maps.shape[1:]) for name, maps in stages.items()} == shapes
    for name in student.stage_names:
        assert (outputs.stages[0][name] is outputs.stages[1][name]) == (name in shared)
    with torch.no_grad():
        assert torch.equal(student(images), outputs.logits)


def test_names_in_the_state_dict() -> None:
    keys = _student(split_after="stage2", ensemble="gate").state_dict()
    tops = {".".join(key.split(".")[:3]) for key in keys}
    branches = {f"branches.{k}.{part}" for k in range(3) for part in ("stages", "head")}
    trunk = {f"trunk.stages.{name}" for name in ("stem", "stage1", "stage2")}
    assert tops == branches | trunk | {key for key in keys if key.startswith("gate.")}
    assert "branches.2.stages.stage3.0.conv1.weight" in keys
    assert not [key for key in _student(split_after="none").state_dict() if key.startswith("trunk")]


@pytest.mark.parametrize("split_after", ["none", "stage1", "stage3"])
def test_one_branch_is_the_plain_network_of_the_same_seed(split_after: str) -> None:
    student = _student(branches=1, split_after=split_after).eval()
    torch.manual_seed(0)
    network = build_network(_spec()).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(student(images), network(images))


def test_ensemble_outputs_against_numpy() -> None:
    images = torch.rand(4, 3, 32, 32)
    student = _student(split_after="stage2")
    outputs = _outputs(student, images)
    logits = outputs.branch_logits.double().numpy()
    np.testing.assert_allclose(outputs.logits.numpy(), logits.sum(0) / 3, rtol=1e-5, atol=1e-6)

    by_probability = _student(split_after="stage2", ensemble="mean_probs")
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    found = _outputs(by_probability, images)
    np.testing.assert_array_equal(found.branch_logits.numpy(), outputs.branch_logits.numpy())
    np.testing.assert_allclose(found.logits.numpy(), np.log(probabilities.mean(0)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.logits.exp().sum(1).numpy(), 1, rtol=1e-5)


def test_gate_against_numpy() -> None:
    images = torch.rand(4, 3, 32, 32)
    student = _student(split_after="stage2", ensemble="gate")
    gate = student.gate
    assert gate is not None
    torch.nn.init.uniform_(gate.bn.running_mean)
    outputs = _outputs(student, images)
    pooled = outputs.stages[0]["stage2"].double().numpy().mean((2, 3))
    scores = pooled @ gate.fc.weight.detach().double().numpy().T + gate.fc.bias.detach().double().numpy()
    scores = (scores - gate.bn.running_mean.double().numpy()) / np.sqrt(
        gate.bn.running_var.double().numpy() + gate.bn.eps
    )
    scores = np.maximum(scores, 0)
    weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    expected = sum(weights[:, k, None] * outputs.branch_logits[k].double().numpy() for k in range(3))
    np.testing.assert_allclose(outputs.logits.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_coupling_is_float32_under_autocast_and_safe_for_large_logits(ensemble: str) -> None:
    student = _student(ensemble=ensemble)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = student.eval().outputs(torch.rand(2, 3, 32, 32))
    assert outputs.logits.dtype is torch.float32
    with torch.no_grad():
        for branch in student.branches:
            branch.head.weight.mul_(1e4)
        assert student(torch.rand(2, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "split_after"), [(name, split) for name, splits in SPLITS.items() for split in splits]
)
def test_every_parameter_gets_a_gradient(name: str, split_after: str) -> None:
    student = _student(name, branches=2, split_after=split_after)
    outputs = student.outputs(torch.rand(4, 3, 32, 32))
    functional.cross_entropy(outputs.logits, torch.tensor([0, 1, 2, 3])).backward()
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        # A convolution's bias before batch norm (VGG) has no effect, so its gradient is zero.
        if not (name == "vgg8" and key.endswith("bias")):
            assert parameter.grad.abs().sum() > 0, key


def test_the_gate_learns() -> None:
    student = _student(split_after="stage2", ensemble="gate")
    student.outputs(torch.rand(8, 3, 32, 32)).logits.square().sum().backward()
    assert student.gate is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.gate.parameters())


@pytest.mark.parametrize("split_after", SPLITS["resnet8"])
def test_summed_gradients_teach_equal_branches_what_a_plain_network_learns(split_after: str) -> None:
    student = _student(split_after=split_after, branch_gradients="sum").double()
    for branch in student.branches[1:]:
        branch.load_state_dict(student.branches[0].state_dict())
    plain = _student(branches=1, split_after=split_after).double()
    assert all(torch.equal(plain.state_dict()[name], student.state_dict()[name]) for name in plain.state_dict())
    images, labels = torch.rand(4, 3, 32, 32).double(), torch.tensor([0, 1, 2, 3])

    for network in (student, plain):
        outputs = network.outputs(images)
        features = sum(own["stage2"].square().mean() for own in outputs.stages) / network.num_branches
        branches = functional.cross_entropy(outputs.branch_logits.flatten(0, 1), labels.repeat(network.num_branches))
        coupled = functional.cross_entropy(outputs.logits, labels)
        (coupled + branches + outputs.pooled.square().mean() + features).backward()

    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in student.named_parameters():
        *_, rest = name.split(".", 2 if name.startswith("branches") else 1)
        wanted = expected[f"branches.0.{rest}" if name.startswith("branches") else name]
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_summed_gradients_change_the_branches_own_weights_alone(ensemble: str) -> None:
    images = torch.rand(4, 3, 32, 32).double()
    gradients = {}
    for kind in ("mean", "sum"):
        student = _student(ensemble=ensemble, branch_gradients=kind).double()
        student.outputs(images).logits.square().mean().backward()
        gradients[kind] = {name: parameter.grad for name, parameter in student.named_parameters()}
    for name, gradient in gradients["mean"].items():
        factor = 3 if name.startswith("branches") else 1
        torch.testing.assert_close(gradients["sum"][name], factor * gradient, rtol=1e-9, atol=1e-12)


def test_branches_start_apart_and_stay_independent() -> None:
    student = _student(split_after="stage1")
    images = torch.rand(2, 3, 32, 32)
    before = _outputs(student, images).branch_logits
    assert not torch.equal(before[0], before[1])
    student.outputs(images).branch_logits[1].sum().backward()
    moved = {
        key.split(".")[1]
        for key, parameter in student.branches.named_parameters(prefix="branches")
        if parameter.grad is not None and parameter.grad.any()
    }
    assert moved == {"1"}


def test_changing_one_branch_leaves_the_others() -> None:
    student = _student(split_after="none")
    images = torch.rand(2, 3, 32, 32)
    before = _outputs(student, images).branch_logits
    with torch.no_grad():
        for parameter in student.branches[1].parameters():
            parameter.add_(0.1)
    after = _outputs(student, images).branch_logits
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[2], before[2])
    assert not torch.equal(after[1], before[1])


def test_a_seed_gives_one_student() -> None:
    first, again, other = _student().state_dict(), _student().state_dict(), _student(seed=1).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    key = "branches.2.head.weight"
    assert not torch.equal(first[key], other[key])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"branches": 0}, "branches=0"),
        ({"branches": -1}, "branches=-1"),
        ({"branches": 1.5}, "branches=1.5"),
        ({"branches": True}, "branches=True"),
        ({"split_after": "stag2"}, "'resnet8'.*'stag2'; did you mean 'stage2'.*none, stage1, stage2, stage3, stem"),
        ({"ensemble": "mean"}, "unknown ensemble 'mean'; did you mean 'mean_"),
        ({"ensemble": "gate", "split_after": "none"}, "gate.*trunk.*none"),
    ],
)
def test_impossible_students_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        _student(**arguments)
    assert "\n" not in str(caught.value)


SPEC = NetworkSpec("resnet8", 10, normalization("centered"), {"width": 0.5})
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def student(ensemble: str, split: str = "stage1") -> BranchedStudent:
    torch.manual_seed(0)
    made = BranchedStudent(SPEC, branches=3, split_after=split, ensemble=ensemble)
    with torch.no_grad():
        made.train()(torch.rand(16, 3, 32, 32))  # batch norm statistics of its own
    return made.eval()


@pytest.mark.parametrize("ensemble", ["mean_logits", "mean_probs", "gate"])
def test_branches_that_stay_say_what_they_said(ensemble):
    whole = student(ensemble)
    with torch.no_grad():
        before = whole.outputs(IMAGES)
    for kept in [[0], [2], [0, 1], [2, 0], [0, 1, 2]]:
        with torch.no_grad():
            after = cut_branches(whole, kept).outputs(IMAGES)
        branches = before.branch_logits[kept]
        assert torch.equal(after.branch_logits, branches)
        if ensemble == "gate":
            weights = whole.gate(before.stages[0]["stage1"])[:, kept]
            weights = weights / weights.sum(1, keepdim=True)
            expected = (weights.T[..., None] * branches).sum(0)
        elif ensemble == "mean_probs":
            expected = branches.softmax(-1).mean(0).log()
        else:
            expected = branches.mean(0)
        assert torch.allclose(after.logits, expected, atol=1e-5)


def test_the_student_stays_as_it_is_and_shares_nothing():
    whole, generator = student("gate"), torch.get_rng_state()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    copy = cut_branches(whole.double().train(), [2, 0])
    assert copy.training
    assert next(copy.parameters()).dtype == torch.float64
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert all(torch.equal(value.float(), before[name].float()) for name, value in whole.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_separate_networks_and_a_gate_that_has_nothing_to_weigh():
    assert cut_branches(student("mean_logits", "none"), [1]).num_branches == 1
    assert cut_branches(student("gate"), [1]).gate is None


@pytest.mark.parametrize(("kept", "said"), [([], "at least 1"), ([3], "0 to 2"), ([-1], "0 to 2"), ([1, 1], "twice")])
def test_impossible_choices_are_refused(kept, said):
    with pytest.raises(UserError, match=said):
        cut_branches(student("mean_logits"), kept)


@pytest.mark.parametrize("name", [*SPLITS, "timm:mobilenetv3_small_050"])
def test_late_branches_fold_into_one_head(name):
    torch.manual_seed(0)
    spec = NetworkSpec(name, 10, normalization("centered"))
    last = build_network(spec).stage_names[-1]
    whole = BranchedStudent(spec, branches=3, split_after=last).eval()
    if name.startswith("timm:"):  # its head follows a convolution of the branch's own
        with pytest.raises(UserError, match="between the last stage"):
            fold_branches(whole)
        return
    folded = fold_branches(whole)
    with torch.no_grad():
        before, after = whole.outputs(IMAGES), folded.outputs(IMAGES)
    weights = [(b.head.weight.detach().double().numpy(), b.head.bias.detach().double().numpy()) for b in whole.branches]
    pooled = before.pooled[0].double().numpy()
    expected = np.mean([pooled @ weight.T + bias for weight, bias in weights], axis=0)
    assert np.allclose(after.logits.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(after.logits, before.logits, rtol=1e-5, atol=1e-5)
    assert {name: value.shape for name, value in folded.state_dict().items()} == {
        name: value.shape for name, value in BranchedStudent(spec, branches=1, split_after=last).state_dict().items()
    }
    assert whole.num_branches == 3
    assert not {value.data_ptr() for value in folded.parameters()} & {value.data_ptr() for value in whole.parameters()}


@pytest.mark.parametrize(
    ("ensemble", "split", "reason"),
    [
        ("gate", "stage3", "ensemble=gate combines them non-linearly"),
        ("mean_probs", "stage3", "ensemble=mean_probs"),
        ("mean_logits", "stage2", "stages stage3, which are not linear .split_after=stage3 can be folded"),
        ("mean_logits", "none", "stages stem, stage1, stage2, stage3"),
    ],
)
def test_branches_that_do_not_fold_are_refused_with_the_reason(ensemble, split, reason):
    with pytest.raises(UserError, match=reason):
        fold_branches(student(ensemble, split))
