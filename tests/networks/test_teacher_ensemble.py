"""Teachers cannot drift, and never enter a checkpoint."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ekd_lightning.errors import UserError
from ekd_lightning.networks import (
    BranchedStudent,
    NetworkSpec,
    StagedNetwork,
    TeacherEnsemble,
    TeacherIdentity,
    build_network,
    normalization,
    state_sha256,
)


def _network(name: str, seed: int, num_classes: int = 10, statistics: str = "cifar10") -> StagedNetwork:
    torch.manual_seed(seed)
    return build_network(NetworkSpec(name, num_classes, normalization(statistics)))


def _identity(id: str, network: StagedNetwork) -> TeacherIdentity:
    return TeacherIdentity(id, state_sha256(network), "trained", network.spec.name)


def _ensemble() -> TeacherEnsemble:
    members = [_network("resnet8", 0), _network("wrn_16_1", 1, statistics="imagenet")]
    return TeacherEnsemble(members, [_identity("one", members[0]), _identity("two", members[1])])


class Parent(nn.Module):
    """Like a training module: the teachers hang somewhere deep, under a name of its choice."""

    def __init__(self, teachers: TeacherEnsemble) -> None:
        super().__init__()
        self.wrapped = nn.ModuleDict({"somewhere": teachers})
        spec = NetworkSpec("resnet8", 10, normalization("cifar10"))
        self.student = BranchedStudent(spec, branches=2, split_after="stage2")


def test_outputs_are_the_members_own() -> None:
    ensemble = _ensemble()
    images = torch.rand(3, 3, 32, 32)
    outputs = ensemble(images, stages=("stage2", "stem"))
    assert (len(ensemble.members), ensemble.num_classes) == (2, 10)
    assert outputs.logits.shape == (2, 3, 10)
    with torch.no_grad():
        for m, member in enumerate(ensemble.members):
            own = member.outputs(images)
            assert torch.equal(outputs.logits[m], own.logits)
            assert torch.equal(outputs.pooled[m], own.pooled)
            assert set(outputs.stages[m]) == {"stage2", "stem"}
            assert torch.equal(outputs.stages[m]["stage2"], own.stages["stage2"])
    assert ensemble(images).stages == ({}, {})


def test_outputs_can_be_targets_of_any_loss() -> None:
    outputs = _ensemble()(torch.rand(2, 3, 32, 32))
    assert not outputs.logits.requires_grad
    assert not outputs.logits.is_inference()
    prediction = torch.zeros(2, 10, requires_grad=True)
    nn.functional.mse_loss(prediction, outputs.logits[0]).backward()
    assert prediction.grad is not None


def test_training_the_parent_leaves_teachers_bit_identical() -> None:
    teachers = _ensemble()
    parent = Parent(teachers).train()
    before = copy.deepcopy([member.state_dict() for member in teachers.members])
    assert not any(module.training for member in teachers.members for module in member.modules())
    assert not any(parameter.requires_grad for member in teachers.members for parameter in member.parameters())
    optimizer = torch.optim.SGD(parent.parameters(), lr=0.5)
    for _ in range(2):
        images = torch.rand(4, 3, 32, 32)
        loss = (parent.student(images) - teachers(images).logits.mean(0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for member, state in zip(teachers.members, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in member.state_dict().items())
    teachers.verify()


def test_state_dicts_hold_no_teacher() -> None:
    parent = Parent(_ensemble())
    assert all(key.startswith("student.") for key in parent.state_dict())
    assert dict(_ensemble().state_dict()) == {}


def test_a_parent_loads_strictly_without_its_teachers() -> None:
    parent = Parent(_ensemble())
    state = parent.state_dict()
    for target in (Parent(_ensemble()), copy.deepcopy(parent), nn.ModuleDict({"outer": Parent(_ensemble())})):
        prefix = "outer." if isinstance(target, nn.ModuleDict) else ""
        result = target.load_state_dict({prefix + key: value for key, value in state.items()}, strict=True)
        assert result.missing_keys == result.unexpected_keys == []
    assert _ensemble().load_state_dict({}).missing_keys == []


def test_a_strict_load_still_catches_everything_else() -> None:
    parent = Parent(_ensemble())
    state = dict(parent.state_dict())
    del state["student.branches.0.head.bias"]
    with pytest.raises(RuntimeError, match=r"student\.branches\.0\.head\.bias") as caught:
        parent.load_state_dict(state)
    assert "members" not in str(caught.value)
    assert parent.load_state_dict(state, strict=False).missing_keys == ["student.branches.0.head.bias"]


def test_weights_for_teachers_in_a_checkpoint_are_refused() -> None:
    parent = Parent(_ensemble())
    teachers = parent.wrapped["somewhere"]
    key = "wrapped.somewhere.members.0.head.bias"
    state = {**parent.state_dict(), key: torch.full((10,), 7.0)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*members\.0\.head\.bias"):
        parent.load_state_dict(state)
    assert parent.load_state_dict(state, strict=False).unexpected_keys == [key]
    teachers.verify()


def test_drift_is_found() -> None:
    ensemble = _ensemble()
    ensemble.verify()
    with torch.no_grad():
        ensemble.members[1].stages["stage3"].bn.running_mean[0] += 1e-3
    with pytest.raises(RuntimeError, match="'two' has changed"):
        ensemble.verify()


def test_mistakes_are_refused() -> None:
    ten, five = _network("resnet8", 0), _network("resnet8", 0, num_classes=5)
    with pytest.raises(UserError, match="at least 1 teacher"):
        TeacherEnsemble([], [])
    with pytest.raises(UserError, match="'a' has 10, 'b' has 5"):
        TeacherEnsemble([ten, five], [_identity("a", ten), _identity("b", five)])
    with pytest.raises(ValueError, match="1 teachers but 0 identities"):
        TeacherEnsemble([ten], [])
    with pytest.raises(UserError, match=r"teacher 'one'.*'stage9'; did you mean 'stage3'"):
        _ensemble()(torch.rand(1, 3, 32, 32), stages=("stage9",))


def test_members_move_with_the_ensemble() -> None:
    ensemble = _ensemble().to(torch.float64)
    outputs: Any = ensemble(torch.rand(1, 3, 32, 32, dtype=torch.float64))
    assert outputs.logits.dtype is torch.float64
    moved = Parent(_ensemble()).to("meta").wrapped["somewhere"].members
    assert {p.device.type for member in moved for p in member.parameters()} == {"meta"}
