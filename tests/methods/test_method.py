from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_lightning.errors import UserError
from ekd_lightning.methods import Method, Term, build_method, needs_teachers, register_term
from ekd_lightning.methods.terms import TERMS
from ekd_lightning.networks.staged import StudentOutput, TeacherOutput

from . import reference
from .helpers import D, make_batch, make_student, make_teachers, sizes

EKD = {
    "ce_ensemble": {"weight": 0.1},
    "ce_branch": {"weight": 0.2},
    "kd_ensemble": {"weight": 0.9},
    "kd_branch": {"weight": 0.8},
    "feature_branch": {"weight": 3.0},
}


@st.composite
def problems(draw):
    K, M = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["one_to_one", "mean", "permuted", "random", "rows"]))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    if kind == "rows":
        # Multiples of 1/8 sum to 1 exactly.
        kind = (rng.multinomial(8, np.full(M, 1 / M), size=K) / 8).tolist()
    weights = {name: draw(st.floats(0.01, 5)) for name in EKD}
    return {
        "K": K,
        "M": M,
        "B": draw(st.integers(1, 4)),
        "C": draw(st.integers(2, 5)),
        "assignment": kind,
        "temperature": draw(st.floats(0.5, 20)),
        "combine": draw(st.sampled_from(["logits", "probabilities"])),
        "weights": weights,
        "rng": rng,
    }


@settings(max_examples=60, deadline=None)
@given(problem=problems(), step=st.integers(0, 5))
def test_the_whole_loss_against_loops_in_numpy(problem, step):
    p, rng = problem, problem["rng"]
    K, M, B, C = p["K"], p["M"], p["B"], p["C"]
    branches, teachers = 3 * rng.normal(size=(K, B, C)), 3 * rng.normal(size=(M, B, C))
    student_pooled, teacher_pooled = rng.normal(size=(K, B, D)), rng.normal(size=(M, B, D))
    ensemble = branches.mean(0)
    batch = make_batch(B, C)
    options = {"kd_ensemble": {"combine": p["combine"]}, "kd_branch": {"combine": p["combine"]}}
    terms = {name: {"weight": w, **options.get(name, {})} for name, w in p["weights"].items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = build_method(
            "ekd",
            terms,
            sizes(K, M, C, teacher_features=(D,) * M, seed=1),
            temperature=p["temperature"],
            assignment=p["assignment"],
        )
    loss = method(
        StudentOutput(
            torch.from_numpy(ensemble), torch.from_numpy(branches), torch.from_numpy(student_pooled), ({},) * K
        ),
        TeacherOutput(torch.from_numpy(teachers), tuple(torch.from_numpy(teacher_pooled)), ({},) * M),
        batch,
        step=step,
    )
    A = method.assignment.matrix(step).numpy().astype(np.float64)
    expected, total = reference.ekd(
        ensemble=ensemble,
        branches=branches,
        teachers=teachers,
        labels=batch.labels.numpy(),
        student_pooled=student_pooled,
        teacher_pooled=teacher_pooled,
        assignment=A / A.sum(1, keepdims=True),  # thirds in float32 do not sum to 1 in float64
        temperature=p["temperature"],
        combine=p["combine"],
        weights=p["weights"],
    )
    assert list(loss.terms) == list(expected)
    for name, value in expected.items():
        # 1e-6: the assignment matrix is float32
        assert loss.terms[name].item() == pytest.approx(value, rel=1e-6, abs=1e-6), name
    assert loss.total.item() == pytest.approx(total, rel=1e-6, abs=1e-6)


def build(terms=None, K=2, M=3, temperature=4.0, assignment="mean", **changes):
    context = sizes(K, M, **changes)
    terms = EKD if terms is None else terms
    return build_method("ekd", terms, context, temperature=temperature, assignment=assignment)


def test_gradients_of_the_whole_loss_in_double_precision():
    method = build().double()
    teachers, batch = make_teachers(B=3, dtype=torch.float64), make_batch(B=3)

    def total(branch_logits, pooled):
        student = StudentOutput(branch_logits.mean(0), branch_logits, pooled, ({},) * 2)
        return method(student, teachers, batch).total

    student = make_student(B=3, dtype=torch.float64)
    inputs = (student.branch_logits.detach().requires_grad_(), student.pooled.detach().requires_grad_())
    assert torch.autograd.gradcheck(total, inputs)


def test_parameters_and_state_are_those_of_the_adapters():
    method = build(assignment="one_to_one", M=2)
    names = {n.rsplit(".", 2)[0] for n, _ in method.named_parameters()}
    assert names == {f"terms.feature_branch.adapters.branch{k}_teacher{k}" for k in range(2)}
    assert all(key.startswith("terms.feature_branch.adapters.") for key in method.state_dict())
    assert list(build({"kd_branch": {"weight": 1}}).parameters()) == []


@pytest.fixture
def raising_term():
    @register_term("test_raises")
    class Raises(Term):
        def __init__(self, weight, context, *, level: int = 0):
            super().__init__(weight)
            if level:
                raise AssertionError("built")

        def forward(self, context):
            raise AssertionError("evaluated")

    yield Raises
    del TERMS["test_raises"]


def test_a_term_that_returns_no_scalar_is_named(raising_term, monkeypatch):
    for value, found in ((torch.ones(4), r"values of shape \(4,\)"), (None, "None")):
        monkeypatch.setattr(raising_term, "forward", lambda self, context, value=value: value)
        method = build({"test_raises": {"weight": 1}}, temperature=None, assignment=None)
        with pytest.raises(UserError, match=f"^method.terms.test_raises: must return a scalar, not {found}"):
            method(make_student(), None, make_batch())


def test_options_are_compared_with_their_annotations_before_a_term_is_built(raising_term):
    for level, message in (("abc", "option level='abc' of term 'test_raises': must be int"), (None, "level=null of")):
        with pytest.raises(UserError, match=f"^method.terms.test_raises: .*{message}"):
            build({"test_raises": {"weight": 0, "level": level}, "ce_branch": {"weight": 1}})


def test_a_term_of_weight_zero_is_neither_built_nor_evaluated(raising_term):
    terms = {"ce_ensemble": {"weight": 1}, "test_raises": {"weight": 0, "level": 1}}
    method = build(terms, temperature=None, assignment=None)
    assert list(method(make_student(), None, make_batch()).terms) == ["ce_ensemble"]
    direct = Method("m", {"bad": raising_term(0.0, None), **dict(method.named_terms())})
    direct(make_student(), None, make_batch())
    with pytest.raises(AssertionError, match="evaluated"):
        build({"test_raises": {"weight": 1}}, temperature=None, assignment=None)(make_student(), None, make_batch())


def test_names_of_a_term_of_weight_zero_are_checked_all_the_same():
    with pytest.raises(UserError, match="'combin'; did you mean 'combine'"):
        build({**EKD, "kd_branch": {"weight": 0, "combin": "logits"}})


def test_zero_weights_drop_teachers_stages_and_adapters():
    stage = {"weight": 1, "feature": "stage1"}
    full = build({**EKD, "feature_branch": stage})
    assert full.needs_teachers
    assert full.teacher_stages == full.student_stages == ("stage1",)
    without = build({**EKD, "feature_branch": {**stage, "weight": 0}})
    assert without.teacher_stages == ()
    assert list(without.parameters()) == []
    only_ce = {name: {"weight": float(name.startswith("ce"))} for name in EKD}
    assert not build(only_ce, M=0, temperature=None, assignment=None).needs_teachers


def test_needs_are_known_before_and_after_building():
    no_kd = {name: {"weight": float(name.startswith("ce"))} for name in EKD}
    assert needs_teachers(EKD)
    assert not needs_teachers(no_kd)
    with pytest.raises(UserError, match="did you mean 'kd_branch'"):
        needs_teachers({"kd_brunch": {"weight": 1}})
    assert build().needs_pooled
    assert not build({**EKD, "feature_branch": {"weight": 1, "feature": "stage1"}}).needs_pooled
    assert not build({"kd_branch": {"weight": 1}}).needs_pooled


def test_type_lets_one_term_occur_twice():
    terms = {"sharp": {"type": "kd_branch", "weight": 1, "temperature": 1.0}, "kd_branch": {"weight": 2}}
    loss = build(terms)(make_student(), make_teachers(), make_batch())
    torch.testing.assert_close(loss.total, loss.terms["sharp"] + 2 * loss.terms["kd_branch"])
    assert loss.terms["sharp"] != loss.terms["kd_branch"]


def test_weights_can_follow_the_time():
    class Ramp(Term):
        def weight_at(self, progress):
            return self.weight * progress

        def forward(self, context):
            return context.student.logits.square().mean()

    method, student = Method("m", {"ramp": Ramp(2.0)}), make_student()
    assert method.changes
    loss = method(student, None, make_batch(), epoch=1, step=10, progress=0.25)
    torch.testing.assert_close(loss.total, 0.5 * student.logits.square().mean())
    torch.testing.assert_close(loss.terms["ramp"], student.logits.square().mean())


def test_one_branch_and_one_teacher_make_all_assignments_equal():
    student, teachers, batch = make_student(1), make_teachers(1), make_batch()
    terms = {name: spec for name, spec in EKD.items() if name != "feature_branch"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        totals = [
            build(terms, 1, 1, assignment=kind)(student, teachers, batch).total
            for kind in ("one_to_one", "mean", "permuted", "random", [[1.0]])
        ]
    for total in totals:
        torch.testing.assert_close(total, totals[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"terms": {"kd_brunch": {"weight": 1}}}, "unknown term 'kd_brunch'; did you mean 'kd_branch'"),
        ({"terms": {"kd_branch": {"weight": -1}}}, "method.terms.kd_branch.weight=-1: must be at least 0"),
        ({"terms": {"kd_branch": {"weight": float("nan")}}}, r"method.terms.kd_branch.weight=nan"),
        ({"terms": {"kd_branch": {}}}, "give at least a weight"),
        ({"terms": {"kd_branch": 1.0}}, r"method.terms.kd_branch=1.0 .*weight"),
        ({"terms": {"kd_branch": {"weight": 1, "temperature": -2}}}, r"method.terms.kd_branch: temperature=-2"),
        ({"terms": {"keys": {"weight": 1, "type": "kd_branch"}}}, r"method.terms.keys: not a usable name"),
        ({"terms": {"a.b": {"weight": 1, "type": "kd_branch"}}}, r"method.terms.a.b: not a usable name"),
        ({"terms": {"kd_branch": {"weight": 0}}}, "no term with a positive weight"),
        ({"terms": {}}, "no term with a positive weight"),
        ({"temperature": 0}, "method.temperature=0: must be at least 0.001"),
        ({"temperature": float("nan")}, r"method.temperature=nan"),
        ({"assignment": "mean_"}, "unknown assignment 'mean_'; did you mean 'mean'"),
        ({"assignment": [[1, 0, 0]]}, r"2 rows \(branches\) of 3 weights"),
        ({"M": 0}, "method.terms.kd_ensemble: .*needs teachers"),
        ({"K": 0}, "branches=0"),
    ],
)
def test_user_mistakes_are_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        build(**changes)
    assert "\n" not in str(error.value)


def test_settings_without_effect_warn():
    ce = {"ce_ensemble": {"weight": 1}}
    with pytest.warns(UserWarning, match="method.temperature=4.0 has no effect"):
        build(ce, assignment=None)
    with pytest.warns(UserWarning, match="method.assignment=mean has no effect"):
        build(ce, temperature=None)
    own = {"kd_branch": {"weight": 1, "temperature": 2.0}}
    with pytest.warns(UserWarning, match="method.temperature=4.0 has no effect"):
        build(own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(ce, temperature=None, assignment=None)
        build(own, temperature=None)
        build()


def test_outputs_that_do_not_fit_the_method():
    method = build()
    with pytest.raises(ValueError, match="needs the teachers' outputs"):
        method(make_student(), None, make_batch())
    with pytest.raises(ValueError, match="built for 2 branches and 3 teachers, not for 4 and 3"):
        method(make_student(4), make_teachers(), make_batch())
    maps = build({"maps": {"type": "feature_branch", "weight": 1, "feature": "last"}}, temperature=None)
    bare = make_teachers()._replace(stages=({}, {}, {}))
    with pytest.raises(UserError, match=r"needs the teachers' stages .*; call teachers\(images, method.teacher_stages"):
        maps(make_student(), bare, make_batch())


def test_methods_and_evaluation_need_neither_lightning_nor_hydra_nor_wandb():
    code = (
        "import sys, ekd_lightning.methods, ekd_lightning.evaluation.scores as s;"
        "bad = {'pytorch_lightning', 'lightning', 'hydra', 'omegaconf', 'wandb'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_branch_makes_the_cross_entropy_count_twice_and_that_is_said():
    terms = {"ce_ensemble": {"weight": 1.0}, "ce_branch": {"weight": 1.0}}
    with pytest.warns(UserWarning, match="one branch, so ce_branch equals ce_ensemble"):
        method = build_method("x", terms, sizes(1, 0))
    student, batch = make_student(1), make_batch()
    alone = build_method("x", {"ce_ensemble": {"weight": 1.0}}, sizes(1, 0))
    torch.testing.assert_close(method(student, None, batch).total, 2 * alone(student, None, batch).total)
