from __future__ import annotations

import pytest
import torch
from torch import nn

from ekd_lightning.errors import UserError
from ekd_lightning.methods import Term, build_method, build_term, losses, register_term

from .helpers import D_TEACHER, D, make_batch, make_student, make_teachers, sizes, step_context, term_context


def value(name, assignment="mean", K=2, M=3, temperature=4.0, **options):
    term = build_term(name, 1.0, term_context(K, M, assignment, temperature), **options)
    return term(step_context(make_student(K), make_teachers(M), make_batch(), assignment))


def value_with_option(name, method_temperature, temperature):
    term = build_term(name, 1.0, term_context(temperature=method_temperature), temperature=temperature)
    return term(step_context(make_student(), make_teachers(), make_batch()))


@pytest.mark.parametrize("name", ["kd_ensemble", "kd_branch"])
def test_the_option_temperature_overrides_the_methods(name):
    assert value(name, temperature=9.0) != value(name, temperature=2.0)
    torch.testing.assert_close(value_with_option(name, 9.0, 2.0), value(name, temperature=2.0))
    term = build_term("kd_branch", 1.0, term_context(temperature=9.0), temperature=2.0)
    assert term.temperature == 2.0
    assert not term.uses_temperature
    assert build_term("kd_branch", 1.0, term_context()).uses_temperature


@pytest.mark.parametrize("name", ["kd_ensemble", "kd_branch"])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 8.0])
def test_plain_divergence_has_no_squared_temperature(name, temperature):
    plain = value(name, temperature=temperature, loss="kl_plain")
    torch.testing.assert_close(plain * temperature**2, value(name, temperature=temperature))
    assert build_term(name, 1.0, term_context(), loss="kl_plain").uses_temperature


def test_mse_on_logits_compares_with_the_mean_of_the_teachers():
    student, teachers = make_student(), make_teachers()
    expected = losses.mse(student.logits, teachers.logits.mean(0))
    torch.testing.assert_close(value("kd_ensemble", loss="mse_logits"), expected)
    assert not build_term("kd_ensemble", 1.0, term_context(), loss="mse_logits").uses_temperature


def test_label_smoothing():
    student, batch = make_student(), make_batch()
    smooth = nn.functional.cross_entropy(student.logits, batch.labels, label_smoothing=0.2)
    torch.testing.assert_close(value("ce_ensemble", label_smoothing=0.2), smooth)


def adapters(**options):
    assignment = options.pop("assignment", "mean")
    return build_term("feature_branch", 1.0, term_context(assignment=assignment), **options).adapters


def test_adapters_follow_shapes_and_assignment():
    assert [type(a[0]) for a in adapters().values()] == [nn.Linear] * 6
    assert [type(a[0]) for a in adapters(feature="stage1").values()] == [nn.Conv2d] * 6
    # 6 channels on both sides; the teachers' maps are smaller, which pooling settles
    assert [type(a) for a in adapters(feature="stage2").values()] == [nn.Identity] * 6
    assert [type(a[0]) for a in adapters(feature="stage2", adapter="project").values()] == [nn.Conv2d] * 6
    one_each = adapters(assignment=[[0, 1, 0], [0, 0.5, 0.5]])
    assert list(one_each) == ["branch0_teacher1", "branch1_teacher1", "branch1_teacher2"]
    assert len(adapters(assignment="random")) == 6
    assert adapters()["branch0_teacher0"][0].bias is None


def test_feature_value_by_hand():
    """Identity on equal channels; an 4×4 student map is averaged to the teacher's 2×2."""
    student, teachers = make_student(), make_teachers()
    rows = [[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]
    expected = 0.0
    for k in range(2):
        pooled = student.stages[k]["stage2"].reshape(5, 6, 2, 2, 2, 2).mean((3, 5))
        for m in range(3):
            expected += rows[k][m] * (pooled - teachers.stages[m]["stage2"]).square().mean() / 2
    torch.testing.assert_close(value("feature_branch", rows, feature="last"), expected)


def test_projected_pooled_value_by_hand():
    term = build_term("feature_branch", 1.0, term_context(1, 1))
    student, teachers = make_student(1), make_teachers(1)
    z = student.pooled[0] @ term.adapters["branch0_teacher0"][0].weight.T
    z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
    expected = (z - teachers.pooled[0]).square().mean()
    torch.testing.assert_close(term(step_context(student, teachers, make_batch())), expected)


@pytest.mark.parametrize("options", [{}, {"feature": "stage1", "grid": 1}])
def test_a_last_batch_of_one_image_is_survived(options):
    term = build_term("feature_branch", 1.0, term_context(1, 1), adapter="project", **options)
    teachers = make_teachers(1, B=1)
    teachers.stages[0]["stage1.1x1"] = teachers.stages[0]["stage1"].mean((2, 3), keepdim=True)
    out = term(step_context(make_student(1, B=1), teachers, make_batch(B=1)))
    assert out.isfinite()


MISTAKES = [
    ("kd_branhc", {}, "unknown term 'kd_branhc'; did you mean 'kd_branch'"),
    ("kd_branch", {"temprature": 2}, "option of term 'kd_branch': 'temprature'; did you mean 'temperature'"),
    ("kd_branch", {"temperature": 0}, "temperature=0: must be at least 0.001"),
    ("kd_branch", {"temperature": 1e-30}, r"temperature=1e-30: must be in \[0.001, 1000\]"),
    ("kd_branch", {"temperature": "4"}, "temperature='4'"),
    ("kd_branch", {"temperature": float("inf")}, "temperature=inf"),
    ("kd_branch", {"combine": "sum"}, "combine 'sum' .*logits, probabilities"),
    ("kd_branch", {"loss": "mse"}, "loss 'mse'.*kl, kl_plain, mse_logits"),
    (
        "kd_branch",
        {"loss": "mse_logits", "combine": "probabilities"},
        "takes no temperature and no combine=probabilities",
    ),
    ("kd_branch", {"reduction": "none"}, "reduction 'none'.*mean, sum"),
    ("ce_branch", {"label_smoothing": 1.0}, r"label_smoothing=1.0: must be in \[0, 1\)"),
    ("ce_ensemble", {"reduction": "sum"}, "option of term 'ce_ensemble': 'reduction'"),
    ("feature_branch", {"adapter": "identity"}, rf"'small' has shape \[{D}\], the teacher 'big0' \[{D_TEACHER}\]"),
    ("feature_branch", {"feature": "stage1", "adapter": "identity"}, r"\[4, 8, 8\].*\[5, 8, 8\]"),
    ("feature_branch", {"adapter": "none"}, "adapter 'none'"),
    ("feature_branch", {"feature": ["stage1", "stage2"]}, r"feature=\['stage1', 'stage2'\] .* must be str"),
    ("feature_branch", {"feature": "stage9"}, "student 'small' has no stage 'stage9' .*stem, stage1, stage2"),
    ("dkd", {"alpha": -1.0}, "alpha=-1.0"),
    ("dkd", {"beta": "x"}, "beta='x'"),
    ("dkd", {"temperature": 0}, "temperature=0"),
    ("kd_standardized", {"reduction": "max"}, "reduction"),
    ("attention", {}, "student 'small' has no stage 'stage3'"),
    ("attention", {"stages": "stage1"}, "stages='stage1' is not allowed; give a list"),
    ("attention", {"stages": []}, "give a list of 1 or more"),
    ("attention", {"stages": ["stage1", "stage1"]}, "different stage names"),
    ("attention", {"stages": ["pooled"]}, "is not allowed"),
    ("attention", {"stages": [1]}, "is not allowed"),
    ("attention", {"stages": ["stage1"], "form": "l2"}, "form 'l2'"),
    (
        "fsp",
        {"stages": ["stem", "stage1"]},
        r"equal width at every stage: the student 'small' has shape \[4, 8, 8\], .*'big0' \[5, 8, 8\] .*'stage1'",
    ),
    ("fsp", {"stages": ["stem"]}, "give a list of 2 or more"),
    ("fsp", {"stages": ["stem", "stage2"], "pooling": "mean"}, "pooling 'mean'"),
    ("fsp", {"stages": ["stem", "stage2"], "elements": "all"}, "elements 'all'"),
    ("vid", {"stages": ["stage1"], "initial_variance": 0}, "initial_variance=0 .* a number > eps=1e-05"),
    ("vid", {"stages": ["stage1"], "eps": 0}, "eps=0: must be positive"),
    ("vid", {"stages": ["stage4"]}, "no stage 'stage4'"),
    ("similarity", {"feature": "stage9"}, "stage9"),
    ("kd_aekd", {"tolerance": 0.3}, r"tolerance=0.3 .*3 teachers.*>= 0.3333"),
    ("kd_aekd", {"tolerance": 0}, "tolerance=0: must be positive"),
    ("kd_aekd", {"gradient": "batch"}, "gradient 'batch'.*batch_mean, images"),
    ("kd_ebkd", {"scale": "published"}, "scale 'published'.*published_code"),
    ("kd_camkd", {"temperature": 0}, "temperature=0: must be at least 0.001"),
    ("feature_camkd", {"feature": "stage1"}, "feature 'stage1'.*last, pooled"),
    ("peer_attention", {"divisor": 0}, "divisor=0: must be at least 1"),
    ("peer_attention", {"combine": "sum"}, "combine 'sum'.*logits, probabilities"),
    ("peer_attention", {"detach_targets": "no"}, "option detach_targets='no' of term 'peer_attention': must be bool"),
    ("leader", {"detach_targets": None}, "detach_targets=null .* must be bool"),
    ("feature_camkd", {"feature": "pooled", "detach_weights": 0}, "detach_weights=0 .* must be bool"),
    ("mutual", {"reduction": "none"}, "reduction 'none'.*mean, sum"),
    ("mutual", {"temperature": -1}, "temperature=-1: must be at least 0.001"),
    ("boundary", {"images": 0}, "images=0"),
    ("boundary", {"steps": 1.5}, "steps=1.5"),
    ("boundary", {"step_size": 0.0}, "step_size=0.0"),
    ("boundary", {"temperature": -1}, "temperature=-1"),
    ("crd", {"features": 0}, "features=0 is not allowed; give an integer >= 1"),
    ("crd", {"negatives": 1.5}, "negatives=1.5 .* must be int"),
    ("crd", {"tau": 0}, "tau=0: must be positive"),
    ("crd", {"momentum": 1.0}, r"momentum=1.0: must be in \[0, 1\)"),
    ("crd", {"scores": "all"}, "scores 'all'"),
]


@pytest.mark.parametrize(("name", "options", "message"), MISTAKES)
def test_user_mistakes_are_one_line(name, options, message):
    images = {"train_index": torch.arange(4), "train_labels": torch.arange(4) % 2}
    with pytest.raises(UserError, match=message) as error:
        build_term(name, 1.0, term_context(4, 3, **images), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "K", "M", "options", "message"),
    [
        ("mutual", 1, 0, {}, "student.branches=1 .*at least 2"),
        ("self_distillation", 1, 0, {}, "student.branches=1 .*at least 2"),
        ("peer_attention", 2, 0, {}, "student.branches=2 .*at least 3"),
        ("leader", 2, 0, {}, "student.branches=2 .*at least 3"),
        ("kd_aekd", 1, 16, {}, r"16 teachers is too costly to solve exactly"),
        ("kd_ebkd", 1, 1, {"scale": "published_code"}, "single teacher the weight 0"),
        ("kd_camkd", 1, 0, {}, "needs teachers"),
    ],
)
def test_counts_that_do_not_fit_are_one_line_that_names_the_term(name, K, M, options, message):
    with pytest.raises(UserError, match=f"method.terms.{name}: .*{message}") as error:
        build_method("m", {name: {"weight": 1.0, **options}}, sizes(K, M))
    assert "\n" not in str(error.value)


def test_a_stage_that_only_a_teacher_lacks():
    context = term_context(teacher_stage_shapes=({"stem": (4, 8, 8)},) * 3)
    with pytest.raises(UserError, match=r"teacher 'big0' has no stage 'stage2' .*available: stem"):
        build_term("feature_branch", 1.0, context, feature="stage2")


@pytest.mark.parametrize("feature", ["stage2", "last"])
def test_a_stage_that_a_teacher_of_no_branch_lacks(feature):
    """All teachers are asked for it."""
    shapes = (*term_context().teacher_stage_shapes[:2], {})
    context = term_context(2, 3, teacher_stage_shapes=shapes)
    with pytest.raises(UserError, match=f"teacher 'big2' has no stage '{feature}' .available: none.; choose a method"):
        build_term("feature_branch", 1.0, context, feature=feature)


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "1", True, None])
def test_weights_that_are_not_allowed(weight):
    with pytest.raises(UserError, match="weight="):
        build_term("ce_ensemble", weight, term_context())


def test_registering_a_name_twice_is_loud_but_redefining_a_class_is_not():
    def define():
        @register_term("test_only_once")
        class Mine(Term):
            pass

        return Mine

    define()
    latest = define()
    from ekd_lightning.methods import terms

    assert terms.TERMS["test_only_once"] is latest
    with pytest.raises(ValueError, match="registered twice"):

        @register_term("test_only_once")
        class Other(Term):
            pass

    del terms.TERMS["test_only_once"]


@pytest.mark.parametrize("name", ["ce_ensemble", "ce_branch"])
def test_cross_entropy_terms_use_soft_labels_where_there_are_any(name):
    batch, student = make_batch(), make_student()
    soft = torch.softmax(torch.randn(5, 4, generator=torch.Generator().manual_seed(9)), dim=-1)
    term = build_term(name, 1.0, term_context())
    logits = student.logits if name == "ce_ensemble" else student.branch_logits
    hard, mixed = (term(step_context(student, None, b)) for b in (batch, batch._replace(soft_labels=soft)))
    torch.testing.assert_close(hard, losses.cross_entropy(logits, batch.labels))
    torch.testing.assert_close(mixed, -(soft * logits.log_softmax(-1)).sum(-1).mean())
    assert not torch.isclose(hard, mixed)
