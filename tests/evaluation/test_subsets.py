"""Subsets and early exit against loops, and against students that really are cut to these branches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_logits import degenerate, random_logits
from scipy.special import log_softmax, logsumexp

from ekd_lightning.data import ImageSet
from ekd_lightning.evaluation import subsets as sub
from ekd_lightning.evaluation.efficiency import count_macs, count_parameters
from ekd_lightning.evaluation.predict import predict, predict_student
from ekd_lightning.networks import BranchedStudent, NetworkSpec, build_network, cut_branches, normalization

CASES = degenerate()
SPEC = NetworkSpec("resnet8", 10, normalization("centered"), {"width": 0.5})
COSTS = [sub.Cost(10, 1), sub.Cost(17, 2), sub.Cost(24, 3)]


def coupled(branches, kept, ensemble):
    z = branches.double().numpy()[kept]
    return z.mean(0) if ensemble == "mean_logits" else logsumexp(log_softmax(z, -1), axis=0) - np.log(len(kept))


@pytest.mark.parametrize("ensemble", ["mean_logits", "mean_probs"])
@pytest.mark.parametrize("name", CASES)
def test_every_subset_is_scored_as_in_a_loop(name, ensemble):
    branches, labels = CASES[name]
    K, y = len(branches), labels.numpy()
    found = sub.score_subsets(branches, labels, COSTS, ensemble)
    assert [row.branches for row in found] == ([[0]] if K == 1 else [[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]])
    for row in found:
        z = coupled(branches, row.branches, ensemble)
        assert row.accuracy == pytest.approx(np.mean(z.argmax(1) == y))
        assert row.nll == pytest.approx(-log_softmax(z, -1)[np.arange(len(y)), y].mean(), rel=1e-9, abs=1e-12)
        assert (row.macs, row.num_parameters) == COSTS[len(row.branches) - 1]


def test_of_many_branches_single_ones_and_prefixes_are_scored():
    assert len(sub.branch_subsets(6)) == 63
    found = sub.branch_subsets(7)
    assert found == [[k] for k in range(7)] + [list(range(n)) for n in range(2, 8)]


@pytest.mark.parametrize("name", CASES)
def test_early_exit_is_that_of_a_loop(name):
    branches, labels = CASES[name]
    K, N = branches.shape[:2]
    for row in sub.early_exit(branches, labels, COSTS, "mean_logits", thresholds=[0.0, 0.4, 0.9, 1.0]):
        right = used = macs = 0
        for i in range(N):
            for n in range(1, K + 1):
                p = torch.softmax(branches[:n, i].double().mean(0), -1)
                if p.max() > row.threshold or n == K:
                    break
            right, used, macs = right + int(p.argmax() == labels[i]), used + n, macs + COSTS[n - 1].macs
        assert (row.accuracy, row.mean_branches, row.macs) == pytest.approx((right / N, used / N, macs / N))


def test_thresholds_of_0_and_1_are_the_first_branch_and_all():
    branches, labels = random_logits()
    first, all_of_them = sub.early_exit(branches, labels, COSTS, "mean_logits", thresholds=[0.0, 1.0])
    scores = {tuple(row.branches): row for row in sub.score_subsets(branches, labels, COSTS, "mean_logits")}
    assert first == (0.0, scores[0,].accuracy, 1.0, COSTS[0].macs)
    assert all_of_them == (1.0, scores[0, 1, 2].accuracy, 3.0, COSTS[2].macs)


def images(N=12):
    pixels = torch.randint(0, 256, (N, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageSet("random", "test", pixels, torch.arange(N) % 10, tuple("abcdefghij"))


@pytest.mark.parametrize("ensemble", ["mean_logits", "mean_probs", "gate"])
def test_a_subset_is_the_cut_student(ensemble):
    """Predictions, parameters and MACs of a subset are those of the student that has no other branches."""
    torch.manual_seed(0)
    student = BranchedStudent(SPEC, branches=3, split_after="stage1", ensemble=ensemble)
    data = images()
    with torch.no_grad():
        student.train()(data.images.float() / 255)
    found = predict_student(student, data, batch_size=5)
    assert student.training
    assert (found.gate_weights is not None) == (ensemble == "gate")
    costs = sub.costs_by_size(student, 32)
    for kept in sub.branch_subsets(3):
        cut = cut_branches(student, kept)
        logits = sub.couple_branches(found.branch_logits, kept, ensemble, found.gate_weights)
        assert torch.allclose(logits.float(), predict_student(cut, data, batch_size=12).logits, atol=1e-5)
        assert costs[len(kept) - 1] == (count_macs(cut, 32), count_parameters(cut))
    assert torch.allclose(logits.float(), found.logits, atol=1e-5)


@pytest.mark.parametrize("ensemble", ["mean_logits", "gate"])
def test_costs_of_many_branches_are_those_of_cut_students(ensemble):
    student = BranchedStudent(SPEC, branches=5, split_after="stage2", ensemble=ensemble)
    five = sub.costs_by_size(student, 32)
    assert five[-1] == (count_macs(student, 32), count_parameters(student))
    cut = cut_branches(student, range(4))
    assert five[3] == (count_macs(cut, 32), count_parameters(cut))
    assert sub.costs_by_size(cut_branches(student, [0]), 32) == five[:1]


def test_a_gate_that_gives_some_branches_nothing_weighs_them_equally():
    branches, _ = random_logits(N=2)
    weights = torch.tensor([[0.0, 0.0, 1.0], [0.25, 0.75, 0.0]])
    found = sub.couple_branches(branches, [0, 1], "gate", weights)
    expected = torch.stack([branches[:2, 0].mean(0), 0.25 * branches[0, 1] + 0.75 * branches[1, 1]])
    assert torch.allclose(found.float(), expected)
    with pytest.raises(ValueError, match="gate"):
        sub.couple_branches(branches, [0], "gate")


def test_a_plain_network_is_asked_about_every_image_once():
    torch.manual_seed(0)
    network, data = build_network(SPEC).eval(), images()
    with torch.no_grad():
        expected = network.outputs(data.images.float() / 255)
    for batch_size in (5, 100):
        found = predict(network, data, batch_size=batch_size)
        assert torch.allclose(found.logits, expected.logits, atol=1e-5)
        assert torch.allclose(found.pooled, expected.pooled, atol=1e-5)
