"""FitNets: the regressors of the hint, and two stages in one training."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from ekd_lightning.errors import UserError
from ekd_lightning.methods import TermContext, build_method, build_term, losses, terms_with_labels
from ekd_lightning.methods.assignment import build_assignment
from ekd_lightning.methods.pair_terms import ConvRegressor, FeatureBranch
from ekd_lightning.networks import BranchedStudent, NetworkSpec, build_network, normalization
from ekd_lightning.networks.frozen import FrozenNetwork
from ekd_lightning.networks.staged import TeacherOutput, on_grid
from ekd_lightning.networks.teachers import TeacherEnsemble, TeacherIdentity

from .helpers import Heads, make_batch, make_student, make_teachers, preset, sizes, step_context, term_context
from .reference import kl, softmax

BOUNDARY = 0.1111


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("size_m", [(8, 8), (4, 4), (16, 16), (3, 6)])
def test_regressors_bring_maps_to_the_teachers_shape(norm, size_m):
    if not norm and size_m == (16, 16):
        with pytest.raises(UserError, match=r"no regressor from .* \[3, 8, 8\] .* \[5, 16, 16\]") as error:
            ConvRegressor((3, 8, 8), (5, *size_m), norm)
        assert "\n" not in str(error.value)
        return
    regressor = ConvRegressor((3, 8, 8), (5, *size_m), norm)
    out = regressor(torch.randn(2, 3, 8, 8))
    assert out.shape == (2, 5, *size_m)
    assert (out >= 0).all()
    assert [type(layer) for layer in list(regressor)[1:]] == [*([nn.BatchNorm2d] if norm else []), nn.ReLU]


@pytest.mark.parametrize(
    ("norm", "size_m", "kernel"),
    [
        (True, (8, 8), (1, 1)),
        (True, (4, 4), (3, 3)),
        (True, (16, 16), (4, 4)),
        (True, (6, 7), (3, 2)),
        (False, (8, 8), (1, 1)),
        (False, (4, 4), (5, 5)),
    ],
)
def test_kernels_follow_the_ratio_of_the_sizes(norm, size_m, kernel):
    conv = ConvRegressor((3, 8, 8), (5, *size_m), norm)[0]
    assert conv.kernel_size == kernel
    assert (conv.bias is None) == norm
    assert isinstance(conv, nn.ConvTranspose2d) == (size_m == (16, 16))


def test_neither_form_maps_to_maps_of_three_times_the_size():
    with pytest.raises(UserError, match="no regressor"):
        ConvRegressor((3, 4, 4), (3, 12, 12), norm=True)


@pytest.mark.parametrize("adapter", ["conv_reg", "regressor"])
def test_the_hint_is_the_mean_over_all_elements_at_the_teachers_size(adapter):
    term = build_term("feature_branch", 1.0, term_context(1, 1), feature="stage2", adapter=adapter)
    student, teachers = make_student(1), make_teachers(1)
    value = term(step_context(student, teachers, make_batch()))
    regressed = term.adapters["branch0_teacher0"](student.stages[0]["stage2"])
    target = teachers.stages[0]["stage2"]  # [6, 2, 2] for the student's [6, 4, 4]
    torch.testing.assert_close(value, (regressed - target).square().sum() / target.numel())
    value.backward()
    assert teachers.stages[0]["stage2"].grad is None
    assert student.stages[0]["stage2"].grad.abs().sum() > 0
    assert all(p.grad is not None for p in term.parameters())


def test_a_regressor_by_hand_in_double_precision():
    """Romero's form on [6, 4, 4] -> [6, 2, 2]: a 3×3 convolution without padding."""
    term = build_term("feature_branch", 1.0, term_context(1, 1), feature="stage2", adapter="regressor").double()
    student, teachers = (make(1, B=2, dtype=torch.float64) for make in (make_student, make_teachers))
    conv = term.adapters["branch0_teacher0"][0]
    x, target, total = student.stages[0]["stage2"].detach(), teachers.stages[0]["stage2"].detach(), 0.0
    for b in range(2):
        for c in range(6):
            for i in range(2):
                for j in range(2):
                    r = float(((conv.weight[c] * x[b, :, i : i + 3, j : j + 3]).sum() + conv.bias[c]).detach())
                    total += (max(r, 0.0) - float(target[b, c, i, j])) ** 2
    found = term(step_context(student, teachers, make_batch(B=2)))
    assert found.item() == pytest.approx(total / (2 * 6 * 2 * 2))


@pytest.mark.parametrize("adapter", ["conv_reg", "regressor"])
def test_gradients_of_the_hint(adapter):
    term = build_term("feature_branch", 1.0, term_context(1, 1), feature="stage2", adapter=adapter).double()
    student, teachers = (make(1, B=2, dtype=torch.float64) for make in (make_student, make_teachers))

    def value(stage2):
        changed = student._replace(stages=({"stage2": stage2},))
        return term(step_context(changed, teachers, make_batch(B=2)))

    assert torch.autograd.gradcheck(value, student.stages[0]["stage2"].detach().requires_grad_())


def test_regressors_are_for_maps():
    with pytest.raises(UserError, match="adapter=conv_reg is for maps, not for feature=pooled"):
        build_term("feature_branch", 1.0, term_context(), adapter="conv_reg")


def two_stages(seed=0):
    torch.manual_seed(seed)
    spec = preset("fitnet_two_stage")["method"]
    return build_method("x", spec["terms"], sizes(1, 1), temperature=spec["temperature"])


@pytest.mark.parametrize(
    ("progress", "hint", "ce", "kd"),
    [(0, 10, 0, 0), (0.11, 10, 0, 0), (BOUNDARY, 0, 1, 4), ((1 + BOUNDARY) / 2, 0, 1, 2.5), (1, 0, 1, 1)],
)
def test_two_stages_in_one_training(progress, hint, ce, kd):
    method = two_stages()
    loss = method(make_student(1), make_teachers(1), make_batch(), progress=progress)
    terms = {name: float(value) for name, value in loss.terms.items()}
    expected = hint * terms["hint"] + ce * terms["ce_ensemble"] + kd * terms["kd_ensemble"]
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["feature_branch", "similarity", "feature_camkd"])
def test_a_grid_is_the_loss_of_averaged_maps(name):
    """As if student and teachers had maps of that size themselves."""
    place = {"feature": "last"} if name == "feature_camkd" else {"feature": "stage2", "reduction": "sum"}
    batch, student, teachers = make_batch(), make_student(), make_teachers()
    torch.manual_seed(0)
    term = build_term(name, 1.0, term_context(), grid=2, **place)
    torch.manual_seed(0)
    whole = build_term(name, 1.0, term_context(), **place)
    assert (term.teacher_stages, whole.teacher_stages) == (("stage2.2x2",), ("stage2",))
    assert term.student_stages == whole.student_stages == ("stage2",)

    def cells(maps, size):
        B, C, H, W = maps.shape
        return maps.reshape(B, C, size, H // size, size, W // size).mean((3, 5))

    ours = student._replace(stages=tuple({"stage2": cells(own["stage2"], 2)} for own in student.stages))
    theirs = teachers._replace(stages=tuple({"stage2": cells(own["stage2"], 2)} for own in teachers.stages))
    named = teachers._replace(stages=tuple({"stage2.2x2": own["stage2"]} for own in theirs.stages))
    networks = Heads([6] * 3, dtype=torch.float32)
    found = term(step_context(student, named, batch, networks=networks))
    expected = whole(step_context(ours, theirs, batch, networks=networks))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 2}, "grid=2 is for maps, not for feature=pooled"),
        ({"grid": 4, "feature": "stage2"}, "grid=4 is finer than the maps of the teacher 'big0', 2×2 .*'stage2'"),
        ({"grid": 5, "feature": "stage2"}, "grid=5 is finer than the maps of the student 'small', 4×4"),
        ({"grid": 0, "feature": "stage2"}, "grid=0 is not allowed; give an integer >= 1"),
        ({"grid": "2", "feature": "stage2"}, "grid='2' of term 'feature_branch': must be int or null"),
    ],
)
def test_grids_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message) as error:
        build_term("feature_branch", 1.0, term_context(), **options)
    assert "\n" not in str(error.value)


def test_a_grid_of_a_network_without_maps_is_refused_by_name():
    blind = term_context(teacher_stage_shapes=({},) * 3)
    with pytest.raises(UserError, match="the teacher 'big0' has no stage 'last'"):
        build_term("feature_branch", 1.0, blind, feature="last", grid=2)


def maps_term(K=2, M=3, assignment="one_to_one", shared=(), **options):
    """At stage2, where student and teachers have as many channels; the teachers' maps are smaller."""
    context = term_context(K, M, assignment, shared_stages=shared)
    usual = {"feature": "stage2", "adapter": "identity"}
    return build_term("feature_branch", 1.0, context, **{**usual, **options})


def errors(student, teachers):
    """Mean squared errors [K][M][B] at stage2, by loops over images."""
    ours = [own["stage2"].detach().numpy().reshape(-1, 6, 2, 2, 2, 2).mean((3, 5)) for own in student.stages]
    theirs = [own["stage2"].detach().numpy() for own in teachers.stages]
    return [[[((a - b) ** 2).mean() for a, b in zip(f, t, strict=True)] for t in theirs] for f in ours]


def value(term, student, teachers, assignment="one_to_one"):
    return float(term(step_context(student, teachers, make_batch(), assignment)))


def test_all_teachers_teach_a_stage_of_the_trunk_and_its_own_teacher_that_of_a_branch():
    student, teachers = (make(dtype=torch.float64) for make in (make_student, make_teachers))
    student = student._replace(stages=(student.stages[0],) * 2)  # one trunk
    found = np.array(errors(student, teachers)).mean(2)
    trunk, own = maps_term(shared=("stem", "stage2"), teachers="auto"), maps_term(shared=("stem",), teachers="auto")
    assert trunk.pairs == ((0, 0), (0, 1), (0, 2))
    assert own.pairs == ((0, 0), (1, 1))
    assert (trunk.uses_assignment, own.uses_assignment) == (False, True)
    assert value(trunk, student, teachers) == pytest.approx(found[0].mean())
    assert value(own, student, teachers) == pytest.approx((found[0, 0] + found[1, 1]) / 2)
    added = maps_term(shared=("stage2",), teachers="all", reduction="sum")
    assert value(added, student, teachers) == pytest.approx(found[0].sum())
    every = maps_term(teachers="all")  # of each branch, where nothing is shared
    assert len(every.pairs) == 6
    assert value(every, student, teachers) == pytest.approx(found.mean())


def test_nothing_is_assigned_where_all_teachers_teach_the_trunk():
    terms = {"maps": {"type": "feature_branch", "weight": 1.0, "feature": "stage1", "teachers": "auto"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no teacher is idle
        assert build_method("x", terms, sizes(2, 3, shared_stages=("stem", "stage1"))).assignment is None
    with pytest.warns(UserWarning, match=r"teachers \[2\] .* teach no branch"):
        assert build_method("x", terms, sizes(2, 3)).assignment is not None


@pytest.mark.parametrize("kind", ["label", "entropy"])
@pytest.mark.parametrize("assignment", ["one_to_one", "mean", "permuted"])
def test_confidence_weights_each_image_over_all_teachers(kind, assignment):
    """v from the definitions of CA-MKD and EBKD, image by image."""
    student, teachers = (make(dtype=torch.float64) for make in (make_student, make_teachers))
    K, M, B, labels = 2, 3, 5, make_batch().labels.tolist()
    p = teachers.logits.detach().softmax(-1).numpy()
    squares, T = errors(student, teachers), 4.0
    z = student.branch_logits.detach().numpy()
    kls = [
        [
            [T**2 * kl(softmax(t, T), softmax(s, T)) for s, t in zip(own, his, strict=True)]
            for his in teachers.logits.tolist()
        ]
        for own in z.tolist()
    ]
    A, expected = build_assignment(assignment, K, M).matrix(0).tolist(), np.zeros(2)
    for b in range(B):
        if kind == "label":
            ce = [np.exp(-np.log(p[m, b, labels[b]])) for m in range(M)]
        else:
            ce = [-(p[m, b] * np.log(p[m, b])).sum() for m in range(M)]
        v = [(1 - ce[m] / sum(ce)) / (M - 1) for m in range(M)]
        assert sum(v) == pytest.approx(1)
        for k, m in itertools.product(range(K), range(M)):
            expected += A[k][m] * M * v[m] * np.array([squares[k][m][b], kls[k][m][b]]) / (K * B)
    maps = maps_term(assignment=assignment, confidence=kind)
    logits = build_term("kd_branch", 1.0, term_context(K, M, assignment), confidence=kind)
    for term, one in zip((maps, logits), expected, strict=True):
        assert term.needs_labels == (kind == "label")
        assert term.reads_logits
        assert value(term, student, teachers, assignment) == pytest.approx(one)
    plain = build_term("kd_branch", 1.0, term_context(K, M, assignment), confidence=kind, loss="kl_plain")
    assert value(plain, student, teachers, assignment) == pytest.approx(expected[1] / T**2)


@pytest.mark.parametrize("kind", ["label", "entropy"])
def test_teachers_of_one_opinion_count_alike(kind):
    student, teachers = (make(dtype=torch.float64) for make in (make_student, make_teachers))
    alike = teachers._replace(logits=teachers.logits[:1].expand(3, -1, -1))
    assert value(maps_term(confidence=kind), student, alike) == pytest.approx(value(maps_term(), student, alike))
    trusting, plain = (build_term("kd_branch", 1.0, term_context(), confidence=c) for c in (kind, None))
    assert value(trusting, student, alike, "mean") == pytest.approx(value(plain, student, alike, "mean"))


@pytest.mark.parametrize("options", [{"combine": "probabilities"}, {"loss": "mse_logits"}])
def test_confidence_in_logits_compares_with_one_teacher_after_the_other(options):
    with pytest.raises(UserError, match="confidence=label needs combine=logits and loss=kl or kl_plain"):
        build_term("kd_branch", 1.0, term_context(), confidence="label", **options)


TEACHERS = {"wide": ("wrn_16_2", 128), "dense": ("densenetbc_40_12", 132), "narrow": ("resnet8", 64)}


def test_teachers_that_differ_teach_maps_of_every_stage():
    """Of other families and channels."""
    spec = NetworkSpec("resnet8", 10, normalization("unit"))
    student = BranchedStudent(spec, branches=4, split_after="stage2")
    teachers = [build_network(replace(spec, name=name)) for name, _ in TEACHERS.values()]
    terms = {key: term for key, term in preset("ekd")["terms"].items() if key.startswith("maps")}
    method = build_method("x", terms, TermContext.of(student, teachers, teacher_names=tuple(TEACHERS)))
    built = {key: cast(FeatureBranch, term) for key, term in method.named_terms()}
    assert built["maps1"].pairs == built["maps2"].pairs == ((0, 0), (0, 1), (0, 2))
    assert built["maps3"].pairs == ((0, 0), (1, 1), (2, 2), (3, 0))
    widths = [cast(nn.Sequential, adapter)[0].weight.shape[:2] for adapter in built["maps3"].adapters.values()]
    assert widths == [(channels, 64) for channels in (128, 132, 64, 128)]


@pytest.mark.parametrize("grid", [None, 1])
def test_last_stages_may_have_different_names(grid):
    """VGG-8 ends with stage 4, ResNet-8 with stage 3: each teacher's own last maps are compared, by hand."""
    torch.manual_seed(0)
    spec = NetworkSpec("resnet8", 10, normalization("unit"))
    student = BranchedStudent(spec, branches=2, split_after="stage3").eval()
    networks = [build_network(replace(spec, name=name)).eval() for name in ("resnet8", "vgg8")]
    term = {"last": {"type": "feature_branch", "weight": 1.0, "feature": "last", "adapter": "project", "grid": grid}}
    method = build_method("x", term, TermContext.of(student, networks, teacher_names=("resnet", "vgg"))).eval()
    assert method.teacher_stages == (on_grid("last", grid),)
    images = torch.rand(4, 3, 32, 32)
    ensemble = TeacherEnsemble(networks, [TeacherIdentity(name, "0", "trained", name) for name in ("resnet8", "vgg8")])
    frozen = [FrozenNetwork(one, fold=False, stage_names=method.teacher_stages) for one in networks]
    outputs = student.outputs(images)
    adapters = cast(FeatureBranch, dict(method.named_terms())["last"]).adapters
    expected = 0.0
    for k, (network, adapter, own) in enumerate(zip(networks, adapters.values(), ("stage3", "stage4"), strict=True)):
        theirs, ours = network.outputs(images).stages[own], outputs.stages[k]["stage3"]
        if grid:
            ours, theirs = (functional.adaptive_avg_pool2d(maps, grid) for maps in (ours, theirs))
        projected = adapter(ours)
        theirs, projected = losses.to_common_size(theirs, projected)
        expected += float(((projected - theirs) ** 2).mean()) / 2
    live = ensemble(images, method.teacher_stages)
    joined = TeacherOutput.of([one.named(one(images)) for one in frozen], method.teacher_stages)
    for teachers in (live, joined):
        total = method(outputs, teachers, make_batch(B=4)).total
        assert float(total) == pytest.approx(expected, rel=1e-5)


def test_a_late_split_with_a_teacher_for_each_branch_needs_no_switch():
    """The heads' teachers are all teachers, so the line of overrides and the method's file train alike."""
    spec = preset("ekd")
    maps = {"maps2": {**spec["terms"]["maps2"], "weight": 1.0}}
    context = sizes(3, 3, shared_stages=("stem", "stage1", "stage2"))
    student, teachers = make_student(3), make_teachers(3)
    student = student._replace(stages=(student.stages[0],) * 3)
    torch.manual_seed(0)
    file = build_method("file", maps, context)
    maps["maps2"].pop("teachers")
    torch.manual_seed(0)
    line = build_method("line", maps, context)
    assert sum(p.numel() for p in file.parameters()) == sum(p.numel() for p in line.parameters())
    totals = [method(student, teachers, make_batch()).total for method in (file, line)]
    torch.testing.assert_close(*totals)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teachers": "everyone"}, "teachers 'everyone' .allowed: all, assigned, auto"),
        ({"confidence": "sure"}, "confidence 'sure' .allowed: entropy, label"),
        ({"confidence": True}, "confidence"),
    ],
)
def test_unknown_switches_are_refused(options, message):
    with pytest.raises(UserError, match=message) as error:
        maps_term(**options)
    assert "\n" not in str(error.value)


def test_labels_are_needed_where_confidence_asks_for_them():
    terms = {"maps": {"type": "feature_branch", "weight": 1.0, "confidence": "label"}}
    assert terms_with_labels(terms) == (["maps"], True)
    terms["maps"]["confidence"] = "entropy"
    assert terms_with_labels(terms) == ([], False)
    terms["kd_branch"] = {"weight": 1.0, "confidence": "label"}
    assert terms_with_labels(terms) == (["kd_branch"], False)


def test_a_teacher_of_features_alone_has_no_confidence():
    blind = sizes(2, 2, unknown_classes=(frozenset(range(4)), frozenset()))
    maps = {"type": "feature_branch", "weight": 1.0, "feature": "stage2"}
    build_method("x", {"maps": maps}, blind)
    with pytest.raises(UserError, match=r"'big0' does not predict.*remove method\.terms\.maps"):
        build_method("x", {"maps": {**maps, "confidence": "entropy"}}, blind)
    other = sizes(1, 2, unknown_classes=(frozenset(), frozenset(range(4))))  # it teaches no branch, but has a weight
    for term in ({"type": "kd_branch", "weight": 1.0}, maps):
        with pytest.raises(UserError, match=r"'big1' does not predict.*remove method\.terms\.one"):
            build_method("x", {"one": {**term, "confidence": "entropy"}}, other, assignment=[[1, 0]])
        build_method("x", {"one": term}, other, assignment=[[1, 0]])
