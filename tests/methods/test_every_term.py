"""What holds for every term: who learns from it, in which precision, and what a CUDA graph of it would freeze."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ekd_lightning.data.loader import Batch
from ekd_lightning.methods import build_method
from ekd_lightning.methods.terms import TERMS, BranchTerm
from ekd_lightning.networks.staged import StudentOutput, TeacherOutput

from .helpers import D, Heads, sizes

pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect")

K, M, B, C = 3, 2, 5, 4
STAGES = {"stem": (4, 8, 8), "stage1": (4, 8, 8), "stage2": (6, 4, 4), "stage3": (6, 2, 2)}
NAMES = [name for name in TERMS.names() if TERMS[name].__module__.startswith("ekd_lightning")]
CAPTURED = [name for name in NAMES if TERMS[name].captures]


def context():
    return sizes(
        K,
        M,
        C,
        teacher_features=(D,) * M,
        student_stage_shapes=STAGES,
        teacher_stage_shapes=(STAGES,) * M,
        seed=3,
        train_index=torch.arange(2 * B),
        train_labels=torch.arange(2 * B) % C,
    )


ADAPTED = {"feature_branch": {"adapter": "project"}}  # else there would be nothing to adapt


def built(name, beside_others=True, assignment="random", **options):
    torch.manual_seed(0)
    terms = {"other": {"type": name, "weight": 0.5, **ADAPTED.get(name, {}), **options}}
    if beside_others:
        terms["other"]["schedule"] = {"ramp_up": 0.9}
        terms["ce"] = {"type": "ce_ensemble", "weight": 2.0, "schedule": {"linear": [[0, 1], [1, 3]]}}
    return build_method(name, terms, context(), assignment=assignment)


def stages():
    return {name: torch.randn(B, *shape) for name, shape in STAGES.items()}


def outputs():
    branch_logits = torch.randn(K, B, C)
    student = StudentOutput(
        branch_logits.mean(0), branch_logits, torch.randn(K, B, D), tuple(stages() for _ in range(K))
    )
    teachers = TeacherOutput(
        torch.randn(M, B, C), tuple(torch.randn(B, D) for _ in range(M)), tuple(stages() for _ in range(M))
    )
    index = torch.arange(B)
    images, valid = torch.rand(B, 3, 8, 8), torch.ones(B, dtype=torch.bool)
    return student, teachers, Batch(images, index % C, index, index, valid)


def floats(said, dtype):
    """The outputs of student and teachers in a precision, as leaves, and the batch as it is."""
    student, teachers, batch = said
    parts = (student.branch_logits, student.pooled, student.stages), teachers
    (branch_logits, pooled, stages), teachers = tree_map_only(
        torch.Tensor, lambda x: x.detach().to(dtype).requires_grad_(), parts
    )
    return StudentOutput(branch_logits.mean(0), branch_logits, pooled, stages), teachers, batch


def leaves(tree):
    return [x for x in tree_leaves(tree) if x.is_leaf]


@pytest.mark.parametrize("name", CAPTURED)
def test_the_student_and_the_terms_own_modules_learn_and_nobody_else(name):
    method, networks = built(name, beside_others=False, assignment="mean"), Heads((D,) * M, dtype=torch.float32)
    student, teachers, batch = floats(outputs(), torch.float32)
    loss = method(student, teachers, batch, networks=networks)
    loss.total.backward()
    assert not loss.terms["other"].requires_grad
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())
    taught = [x for x in leaves(student) if x.grad is not None]
    assert taught
    assert all(x.grad.isfinite().all() and x.grad.any() for x in taught)
    assert all(x.grad is None for x in leaves(teachers))
    assert all(p.grad is None for head in networks.heads for p in head.parameters())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CAPTURED)
def test_half_precision_gives_a_float32_loss_close_to_full_precision(name, autocast):
    networks, said = Heads((D,) * M, dtype=torch.float32), outputs()
    half = floats(said, torch.bfloat16)
    wide = floats(half, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = built(name, assignment="mean")(*half, networks=networks)
    expected = built(name, assignment="mean")(*wide, networks=networks)
    assert found.total.dtype == found.terms["other"].dtype == torch.float32
    # Adapters compute in bfloat16 under autocast.
    torch.testing.assert_close(
        found.terms["other"], expected.terms["other"], rtol=0.03 if autocast else 0.01, atol=1e-3
    )


@pytest.mark.parametrize("name", [name for name in CAPTURED if issubclass(TERMS[name], BranchTerm)])
def test_the_sum_over_the_branches_is_k_times_the_mean(name):
    said, networks = outputs(), Heads((D,) * M, dtype=torch.float32)
    mean, total = (
        built(name, beside_others=False, assignment="mean", reduction=reduction)(*said, networks=networks).total
        for reduction in ("mean", "sum")
    )
    torch.testing.assert_close(total, mean * (K - 1 if name == "peer_attention" else K))


@pytest.mark.parametrize("name", CAPTURED)
def test_a_recorded_step_follows_the_tensors_it_is_given(name):
    eager, recorded = built(name), built(name)
    networks = Heads((D,) * M, dtype=torch.float32)
    for step in range(3):
        torch.manual_seed(step)
        said = outputs()
        progress = 0.1 + step / 4
        matrix = recorded.assignment_at(step, progress)
        tensors = {
            "weights": {key: torch.tensor(w) for key, w in recorded.weights_at(progress).items()},
            "assignment_KM": matrix,
            "step_t": torch.tensor(step),
        }
        found = recorded(*said, step=0, progress=0.1, networks=networks, **tensors)
        expected = eager(*said, step=step, progress=progress, networks=networks)
        assert found.terms == expected.terms
        assert torch.equal(found.total, expected.total)
    assert (matrix is None) is not eager.terms["other"].uses_assignment


@pytest.mark.parametrize("name", CAPTURED)
def test_a_term_that_captures_reads_nothing_back_from_the_device(name):
    """On an accelerator's tensors without values, where whatever reads one, or asks for its shape, fails."""
    method, networks, said = built(name), Heads((D,) * M, dtype=torch.float32), outputs()
    with FakeTensorMode() as mode:

        def there(values):
            return tree_map_only(torch.Tensor, lambda x: mode.from_tensor(x).to("cuda"), values)

        state = there({**dict(method.named_parameters()), **dict(method.named_buffers())})
        networks.heads = [nn.Linear(D, C, device="cuda") for _ in range(M)]
        tensors = {
            "weights": there({key: torch.tensor(w) for key, w in method.weights_at(0.1).items()}),
            "assignment_KM": there(torch.eye(K)[:, :M]),
            "step_t": there(torch.tensor(3)),
        }
        loss = torch.func.functional_call(method, state, there(said), {"networks": networks, **tensors})
        assert loss.total.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            loss.total.item()  # the test would see it
