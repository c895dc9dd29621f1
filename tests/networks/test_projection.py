"""Students that end with a projector and a teacher's classifier (SimKD)."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from ekd_lightning import load
from ekd_lightning.cli import export
from ekd_lightning.errors import UserError
from ekd_lightning.methods import TermContext, build_method
from ekd_lightning.methods.assignment import make_assignment
from ekd_lightning.networks import (
    BranchedStudent,
    NetworkSpec,
    build_network,
    load_network,
    load_student,
    normalization,
    state_sha256,
)
from ekd_lightning.networks.projection import classifier_width, reuse_classifiers
from ekd_lightning.networks.staged import StagedNetwork

WIDE = "{train: resnet8, options: {width: 0.5}, seed: %d}"
POOL = f"teachers.pool=[{WIDE % 0}, {WIDE % 2}]"
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def network(name: str = "resnet8", classes: int = 10, **options: object) -> StagedNetwork:
    torch.manual_seed(3)
    return build_network(NetworkSpec(name, classes, normalization("cifar10"), options)).eval()


def projected(width: int, branches: int = 1, split: str = "none") -> BranchedStudent:
    torch.manual_seed(0)
    spec = NetworkSpec("resnet8", 10, normalization("cifar10"), projection=width)
    return BranchedStudent(spec, branches=branches, split_after=split)


def test_the_student_is_that_of_the_published_code():
    """The projector and the prediction of SimKD written out, with the student's weights."""
    teacher, student = network("resnet14", width=2.0), projected(128)
    reuse_classifiers(student.branches, [teacher], torch.ones(1, 1))
    published = nn.Sequential(
        *(nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU()),
    )
    stages = student.branches[0].stages
    published.load_state_dict(stages["projector"].state_dict())
    student.train()  # the statistics of the batch
    outputs = student.outputs(IMAGES)
    maps = published(outputs.stages[0]["stage3"])
    logits = nn.functional.linear(nn.functional.adaptive_avg_pool2d(maps, 1).flatten(1), *teacher.head.parameters())
    assert torch.allclose(outputs.logits, logits, atol=1e-5)
    context = TermContext.of(student, [teacher])
    terms = {"simkd": {"type": "feature_branch", "weight": 1.0, "feature": "last", "adapter": "identity"}}
    method = build_method("simkd", terms, context)
    assert not list(method.parameters())
    frozen = [p for p in student.parameters() if not p.requires_grad]
    assert all(torch.equal(*pair) for pair in zip(frozen, teacher.head.parameters(), strict=True))


def test_a_run_keeps_the_teachers_classifiers(train, store, tmp_path):
    """Two branches, each with the classifier of its own teacher, in the run's student and in what is exported."""
    run = tmp_path / "run"
    words = ("student.branches=2", "student.split_after=stage3", "student.reuse_classifier=true", "trainer.max_steps=6")
    outcome = train(run, POOL, *words, "method.terms.feature_branch.feature=last")
    assert outcome.code == 0, outcome.err
    student = load_student(run / "student.safetensors")
    names = student.stage_names
    assert (names[-1], student.split_after, student.spec.projection) == ("projector", "stage3", student.num_features)
    teachers = json.loads((run / "provenance.json").read_text())["teachers"]
    for branch, teacher in zip(student.branches, teachers, strict=True):  # not trained: bit-equal
        found = [load_network(path) for path in (store / "teachers").rglob("*.safetensors")]
        (own,) = [network for network in found if state_sha256(network) == teacher["sha256"]]
        assert torch.equal(branch.head.weight, own.head.weight)
    export.main([str(run), "-o", str(tmp_path / "out")])
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "out" / "student.safetensors")(IMAGES), student(IMAGES), atol=1e-4)


def test_simkd_from_the_command(train, tmp_path):
    outcome = train(tmp_path / "run", POOL, "method=simkd")
    assert outcome.code == 0, outcome.err
    result = outcome.result
    assert (result["method"], result["num_branches"], result["num_adapter_parameters"]) == ("simkd", 1, 0)


@pytest.mark.parametrize("assignment", ["mean", "random"])
def test_a_branch_of_several_teachers_is_refused(assignment):
    student, teachers = projected(64, branches=2, split="stage3"), [network(), network("resnet14")]
    matrix = torch.full((2, 2), 0.5) if assignment == "random" else make_assignment("mean", 2, 2)
    with pytest.raises(UserError, match="every branch needs one teacher"):
        reuse_classifiers(student.branches, teachers, matrix)


def test_teachers_whose_classifiers_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"one width, but they have 64 \(a\), 128 \(b\)"):
        classifier_width([network(), network(width=2.0)], ["a", "b"], 10)
    with pytest.raises(UserError, match="'a' has no linear classifier of 10 classes"):
        classifier_width([network(classes=7)], ["a"], 10)
    unbiased = network()
    unbiased.head = nn.Linear(64, 10, bias=False)
    with pytest.raises(UserError, match="'a' has no linear classifier of 10 classes, with a bias"):
        classifier_width([unbiased], ["a"], 10)
    assert classifier_width([network(), network("resnet14"), network("wrn_16_1")], list("abc"), 10) == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=ce"], "student.reuse_classifier=true: the method 'ce' has no teachers"),
        (["method=takd", "method.assistants=[resnet8]"], "has assistants"),
        (["method=ekd_mean"], "every branch needs one teacher"),
        (["method=simkd", "method.teacher=mean"], "every branch needs one teacher"),
        (
            ["method=simkd", "student.branches=2", "method.teacher=null", "method.assignment=random"],
            "needs one teacher",
        ),
    ],
)
def test_one_line_before_training(train, tmp_path, words, message):
    outcome = train(tmp_path / "run", POOL, *words, "student.reuse_classifier=true")
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "run" / "status.json").exists()
