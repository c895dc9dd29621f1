from __future__ import annotations

from dataclasses import replace

import torch
import yaml

import ekd_lightning.conf
from ekd_lightning.data.loader import Batch
from ekd_lightning.methods import StepContext, TermContext
from ekd_lightning.methods.assignment import build_assignment
from ekd_lightning.networks.staged import StudentOutput, TeacherOutput

STUDENT_STAGES = {"stem": (4, 8, 8), "stage1": (4, 8, 8), "stage2": (6, 4, 4)}
TEACHER_STAGES = {"stem": (4, 8, 8), "stage1": (5, 8, 8), "stage2": (6, 2, 2)}
D, D_TEACHER = 6, 7


def rand(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def preset(name):
    """A method's file, as it stands."""
    with open(f"{next(iter(ekd_lightning.conf.__path__))}/method/{name}.yaml") as file:
        return yaml.safe_load(file)


class Heads:
    """Stands for the live networks: only the teachers' classifiers can be asked for."""

    def __init__(self, widths, C=4, seed=5, dtype=torch.float64):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.heads = [torch.nn.Linear(width, C, dtype=dtype) for width in widths]

    def classify(self, m, features):
        head = self.heads[m]
        pooled = features if features.dim() == 2 else features.mean((-2, -1))
        return torch.nn.functional.linear(pooled.to(head.weight.dtype), head.weight.detach(), head.bias.detach())


def make_batch(B=5, C=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C, (B,), generator=g)
    index = torch.arange(B)
    return Batch(torch.rand(B, 3, 8, 8, generator=g), labels, index, index * 0, torch.ones(B, dtype=torch.bool))


def make_student(K=2, B=5, C=4, *, d=D, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    branch_logits = rand(K, B, C)
    stages = tuple({name: rand(B, *shape) for name, shape in STUDENT_STAGES.items()} for _ in range(K))
    return StudentOutput(branch_logits.mean(0), branch_logits, rand(K, B, d), stages)


def make_teachers(M=3, B=5, C=4, *, d=D_TEACHER, seed=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        # Real teachers carry no gradient; here they could, so that a leak would show.
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    stages = tuple({name: rand(B, *shape) for name, shape in TEACHER_STAGES.items()} for _ in range(M))
    return TeacherOutput(rand(M, B, C), tuple(rand(B, d) for _ in range(M)), stages)


def sizes(K=2, M=3, C=4, **changes):
    """What `build_method` is told about the networks above."""
    context = TermContext(
        num_classes=C,
        num_branches=K,
        num_teachers=M,
        student_features=D,
        teacher_features=(D_TEACHER,) * M,
        student_stage_shapes=STUDENT_STAGES,
        teacher_stage_shapes=(TEACHER_STAGES,) * M,
        student_name="small",
        teacher_names=tuple(f"big{m}" for m in range(M)),
    )
    return replace(context, **changes)


def term_context(K=2, M=3, assignment="mean", temperature=4.0, **changes):
    built = build_assignment(assignment, K, M) if M else None
    return replace(sizes(K, M), temperature=temperature, assignment=built, **changes)


def step_context(student, teachers, batch, assignment="mean", **time):
    matrix = None
    if teachers is not None:
        matrix = build_assignment(assignment, len(student.branch_logits), len(teachers.logits)).matrix(0)
    return StepContext(student, teachers, batch, matrix, **time)
