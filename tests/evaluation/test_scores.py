from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchmetrics.classification as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    confusion_matrix,
    log_loss,
    recall_score,
    top_k_accuracy_score,
)

from ekd_lightning.evaluation.scores import ClassificationScores, class_accuracy


def make(N=60, C=5, K=3, seed=0, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    branches = scale * torch.randn(K, N, C, generator=g)
    return branches.mean(0), torch.randint(0, C, (N,), generator=g), branches


def run(logits, labels, branches=None, valid=None, *, batch=17, metric=None):
    C, K = logits.shape[1], 0 if branches is None else len(branches)
    scores = metric or ClassificationScores(C, K)
    for start in range(0, len(labels), batch):
        rows = slice(start, start + batch)
        scores.update(
            logits[rows],
            labels[rows],
            None if valid is None else valid[rows],
            None if branches is None else branches[:, rows],
        )
    return scores.compute()


def assert_same(a, b, **tolerance):
    tolerance = tolerance or {"rel": 1e-12, "abs": 1e-12}
    assert a.keys() == b.keys()
    for key in a:
        assert a[key] == pytest.approx(b[key], **tolerance), key


def probabilities(logits):
    z = logits.double().numpy()
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(logits, labels, branches):
    """All scores from their definitions, image by image in float64."""
    p, y = probabilities(logits), labels.numpy()
    N, C = p.shape
    onehot = np.eye(C)[y]
    conf, hit = p.max(1), (logits.numpy().argmax(1) == y)
    ece = 0.0
    for b in range(15):
        inside = [i for i in range(N) if b / 15 < conf[i] <= (b + 1) / 15]
        if inside:
            ece += len(inside) / N * abs(np.mean(hit[inside]) - np.mean(conf[inside]))
    pk = [probabilities(branch) for branch in branches]
    votes, K = branches.argmax(-1).numpy(), len(branches)
    pairs = [(i, j) for i in range(K) for j in range(i)]
    geo = np.exp(np.mean([np.log(q) for q in pk], 0))
    geo /= geo.sum(1, keepdims=True)
    return {
        "accuracy": hit.mean(),
        "nll": -np.mean([np.log(p[i, y[i]]) for i in range(N)]),
        "ece": ece,
        "brier": np.mean([np.sum((p[i] - onehot[i]) ** 2) for i in range(N)]),
        "branch_accuracy": [float((v == y).mean()) for v in votes],
        "disagreement": np.mean([(votes[i] != votes[j]).mean() for i, j in pairs]),
        "ambiguity": np.mean([np.sum(geo * (np.log(geo) - np.log(q)), 1).mean() for q in pk]),
    }


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 70),
    C=st.integers(2, 6),
    K=st.integers(2, 4),
    seed=st.integers(0, 9999),
    scale=st.floats(0.01, 8),
    batch=st.integers(1, 80),
)
def test_against_numpy(*, N, C, K, seed, scale, batch):
    logits, labels, branches = make(N, C, K, seed, scale)
    got = run(logits, labels, branches, batch=batch)
    assert_same(got, reference(logits, labels, branches), rel=1e-5, abs=1e-5)


def test_against_scikit_learn_and_torchmetrics():
    logits, labels, _ = make(300, 30, scale=4.0)
    got, p, y = run(logits, labels), probabilities(logits), labels.numpy()
    assert set(got) == {"accuracy", "nll", "ece", "brier", "top5"}
    assert got["accuracy"] == accuracy_score(y, p.argmax(1))
    assert got["nll"] == pytest.approx(log_loss(y, p, labels=range(30)), rel=1e-6)
    assert got["top5"] == pytest.approx(top_k_accuracy_score(y, p, k=5, labels=range(30)))
    # scikit-learn's binary score of each class against the rest; their sum is ours
    brier = sum(brier_score_loss(y == c, p[:, c]) for c in range(30))
    assert got["brier"] == pytest.approx(brier, rel=1e-6)
    assert got["ece"] == pytest.approx(tm.MulticlassCalibrationError(30, n_bins=15)(logits.softmax(-1), labels).item())
    assert got["accuracy"] == pytest.approx(tm.MulticlassAccuracy(30, average="micro")(logits, labels).item())


@pytest.mark.parametrize("C", [3, 5])
def test_a_confidence_on_an_edge_belongs_to_the_lower_bin(C):
    """Uniform predictions lie exactly on an edge, 1/3 = 5/15; torchmetrics puts them into the bin above."""
    logits = torch.cat([torch.zeros(1, C), torch.nn.functional.one_hot(torch.tensor([0]), C) * 1e-3])
    scores = ClassificationScores(C)
    scores.update(logits, torch.tensor([0, 1]))
    # the second, a little surer, is the first of the next bin; with torchmetrics' rule they would share it
    assert scores.bin_confidence.nonzero().flatten().tolist() == [15 // C - 1, 15 // C]
    assert scores.compute()["ece"] == pytest.approx(((1 - 1 / C) + 1 / C) / 2, abs=1e-3)


def test_top5_and_diversity_only_where_they_mean_something():
    assert "top5" not in run(*make(C=19)[:2])
    assert "top5" in run(*make(C=20)[:2])
    logits, labels, branches = make(K=1)
    assert set(run(logits, labels, branches)) == {"accuracy", "nll", "ece", "brier", "branch_accuracy"}


def test_equal_branches_have_no_diversity():
    logits, labels, _ = make()
    got = run(logits, labels, logits.expand(3, -1, -1))
    assert got["disagreement"] == 0
    assert got["ambiguity"] == pytest.approx(0, abs=1e-6)
    assert got["branch_accuracy"] == [got["accuracy"]] * 3


def test_ambiguity_is_what_averaging_logits_gains():
    logits, labels, branches = make(200, 7, 4)
    got = run(logits, labels, branches)
    each = np.mean([run(branch, labels)["nll"] for branch in branches])
    assert got["nll"] == pytest.approx(each - got["ambiguity"], rel=1e-6)


@pytest.mark.parametrize("gap", [50.0, 1e4, float("inf")])
def test_perfect_and_hopeless_predictions(gap):
    labels = torch.tensor([0, 2, 1, 1])
    right = torch.where(torch.nn.functional.one_hot(labels, 3).bool(), 0.0, -gap)
    got = run(right, labels, torch.stack([right, right]))
    assert_same(
        got,
        {
            "accuracy": 1.0,
            "nll": 0.0,
            "ece": 0.0,
            "brier": 0.0,
            "branch_accuracy": [1.0, 1.0],
            "disagreement": 0.0,
            "ambiguity": 0.0,
        },
        abs=1e-9,
    )
    wrong = run(right, (labels + 1) % 3)
    assert wrong["accuracy"] == 0
    assert wrong["nll"] == gap
    assert (wrong["ece"], wrong["brier"]) == pytest.approx((1, 2))


def test_single_image_single_class_and_uniform_predictions():
    logits, labels, branches = make(1)
    assert_same(run(logits, labels, branches), reference(logits, labels, branches), rel=1e-5, abs=1e-6)
    logits, _, branches = make(40)
    labels = torch.full((40,), 2)
    assert_same(run(logits, labels, branches), reference(logits, labels, branches), rel=1e-5, abs=1e-6)
    flat = run(torch.zeros(10, 4), torch.arange(10) % 4)
    assert flat["nll"] == pytest.approx(np.log(4))
    assert flat["brier"] == pytest.approx(0.75)


def test_log_probabilities_are_logits():
    logits, labels, _ = make()
    assert_same(run(logits.log_softmax(-1), labels), run(logits, labels), rel=1e-6)


def test_bfloat16_logits_are_scored_in_float32():
    logits, labels, branches = make()
    half, half_branches = logits.bfloat16(), branches.bfloat16()
    assert_same(run(half, labels, half_branches), run(half.float(), labels, half_branches.float()))


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 3.0])
@pytest.mark.parametrize("label", [-1, 0, 99])
def test_padding_rows_change_nothing_whatever_they_hold(junk, label):
    logits, labels, branches = make(30, 20)
    padded = torch.cat([torch.full((5, 20), junk), logits, torch.full((7, 20), junk)])
    padded_branches = torch.cat([torch.full((3, 5, 20), junk), branches, torch.full((3, 7, 20), junk)], 1)
    padded_labels = torch.cat([torch.full((5,), label), labels, torch.full((7,), label)])
    valid = torch.tensor([False] * 5 + [True] * 30 + [False] * 7)
    plain = run(logits, labels, branches)
    # batches of 5: the first is padding alone
    assert_same(run(padded, padded_labels, padded_branches, valid, batch=5), plain)


def test_a_diverged_network_is_not_hidden():
    logits, labels, _ = make()
    logits[3] = float("nan")
    got = run(logits, labels)
    assert np.isnan(got["nll"])
    assert np.isnan(got["brier"])


def test_shards_of_unequal_size_merge_to_the_whole():
    logits, labels, branches = make(50, 20)
    whole = run(logits, labels, branches)
    parts = [ClassificationScores(20, 3) for _ in range(2)]
    for part, rows in zip(parts, (slice(0, 13), slice(13, 50)), strict=True):
        part.update(logits[rows], labels[rows], branch_logits=branches[:, rows])
    parts[0].merge_state(parts[1])
    assert_same(parts[0].compute(), whole)


def test_reset_and_copies_start_from_nothing():
    logits, labels, branches = make()
    scores = ClassificationScores(5, 3)
    first = run(logits, labels, branches, metric=scores)
    scores.reset()
    assert_same(run(logits, labels, branches, metric=copy.deepcopy(scores)), first)
    assert scores.state_dict() == {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics' own remark
        with pytest.raises(ValueError, match="no image was scored"):
            scores.compute()


def test_results_are_plain_numbers_and_keep_no_graph():
    logits, labels, branches = make()
    scores = ClassificationScores(5, 3)
    got = run(logits.requires_grad_(), labels, branches.requires_grad_(), metric=scores)
    assert all(isinstance(v, float | list) for v in got.values())
    assert not scores.nll_sum.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.update(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)), r"expected \[4, 5\]"),
        (lambda s: s.update(torch.zeros(4, 5), torch.zeros(4, dtype=torch.long)), r"expected \(3, 4, 5\)"),
        (
            lambda s: s.update(torch.zeros(4, 5), torch.zeros(4).long(), branch_logits=torch.zeros(2, 4, 5)),
            r"\(2, 4, 5\), expected \(3, 4, 5\)",
        ),
    ],
)
def test_shapes_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(ClassificationScores(5, 3))


def _score_shard(rank, world, file, expected):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    try:
        logits, labels, branches = make(31, 20)
        # rank 1 sees 3 images, padded to the length of rank 0's shard
        rows = torch.arange(28) if rank == 0 else torch.tensor([28, 29, 30] + [0] * 25)
        valid = torch.ones(28, dtype=torch.bool) if rank == 0 else torch.arange(28) < 3
        got = run(logits[rows], labels[rows], branches[:, rows], valid)
        assert_same(got, expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_give_the_result_of_one(tmp_path):
    logits, labels, branches = make(31, 20)
    expected = run(logits, labels, branches)
    mp.spawn(_score_shard, args=(2, str(tmp_path / "store"), expected), nprocs=2)


@pytest.mark.parametrize("missing", [None, 2])
def test_accuracies_of_classes_are_recalls(missing):
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, 50), rng.integers(0, 4, 50)
    if missing is not None:
        labels[labels == missing] = 0
    recalls = recall_score(labels, predicted, labels=range(4), average=None, zero_division=np.nan)
    for c, accuracy in enumerate(class_accuracy(confusion_matrix(labels, predicted, labels=range(4)))):
        assert accuracy is None if c == missing else accuracy == pytest.approx(recalls[c])
