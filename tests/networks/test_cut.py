"""Students cut to some of their branches."""

from __future__ import annotations

import pytest
import torch

from ekd_lightning.errors import UserError
from ekd_lightning.networks import BranchedStudent, NetworkSpec, cut_branches, normalization

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


@pytest.mark.parametrize(
    ("kept", "said"), [([], "at least 1"), ([3], "0 to 2"), ([-1], "0 to 2"), ([1, 1], "twice")]
)
def test_impossible_choices_are_refused(kept, said):
    with pytest.raises(UserError, match=said):
        cut_branches(student("mean_logits"), kept)
