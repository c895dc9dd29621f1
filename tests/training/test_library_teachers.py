"""Teachers of other libraries in the pool: planned, loaded, fine-tuned, and named by all that makes them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from ekd_lightning.data import choose_subset, load_dataset, make_views
from ekd_lightning.errors import UserError
from ekd_lightning.networks import NetworkSpec, build_network, normalization, register_network, registry, save_network
from ekd_lightning.networks.cutting import UNKNOWN_LOGIT
from ekd_lightning.pipeline.prepare import prepare
from ekd_lightning.settings import RecipeSettings, TeacherSettings
from ekd_lightning.training.pool import gather_teachers, plan_teachers
from ekd_lightning.training.teacher_training import TeacherData

NAME = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def data():
    dataset = load_dataset("digits", "unused")
    subset = choose_subset(dataset.train.labels, fraction=0.1)
    return TeacherData(dataset, subset, make_views("crop_flip", 2, False), "subset")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of ten classes and the module that they belong to."""
    torch.manual_seed(0)
    module = timm.create_model(NAME, num_classes=10).train()
    module(torch.rand(16, 3, 64, 64))  # batch norm has statistics of its own
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    safetensors.torch.save_file(module.state_dict(), path)
    return path, module.eval()


@pytest.fixture
def plan(data, weights, tmp_path):
    path, _ = weights

    def make(**entry):
        pool = [{"timm": NAME, "weights": str(path), "image_size": 32, **entry}]
        settings = TeacherSettings(pool=pool, recipe=RecipeSettings(epochs=1, batch_size=32))
        return plan_teachers(replace(settings, store=str(tmp_path)), data, "cpu")

    return make


def test_images_for_validation_only_are_kept_from_all_teachers(data):
    held_out = replace(data.dataset, val_index=torch.tensor([3, 1436]))
    everything = replace(data, train_on="all")
    assert everything.index().tolist() == list(range(1437))
    assert replace(everything, dataset=held_out).index().tolist() == [i for i in range(1436) if i != 3]


def test_a_module_of_the_user_needs_a_normalization(data):
    settings = TeacherSettings(pool=[{"module": "mine.make", "finetune": "all"}])
    with pytest.raises(UserError, match=r"^teachers.pool\[0\].normalization: must be given, .* unit \(images in"):
        plan_teachers(settings, data, "cpu")


def test_a_teacher_is_taken_as_it_is(plan, weights):
    _, module = weights
    teachers = gather_teachers(plan(image_size=40))
    (identity,) = teachers.identities
    assert (identity.id, identity.source, identity.network) == (f"timm:{NAME}-mine", "timm", f"timm:{NAME}")
    assert identity.detail["weights"] == "mine.safetensors"
    assert identity.detail["library"] == f"timm {timm.__version__}"
    images = torch.rand(4, 3, 32, 32)
    large = torch.nn.functional.interpolate(images, (40, 40), mode="bilinear", antialias=True)
    imagenet = normalization("imagenet")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (imagenet.mean, imagenet.std))
    assert torch.equal(teachers(images).logits[0], module((large - mean) / std))
    teachers.verify()


def test_all_that_makes_a_teacher_is_in_its_identity(plan):
    changes = ({}, {"image_size": 40}, {"normalization": "unit"}, {"classes": [1, 0, 2, 3, 4, 5, 6, 7, 8, 9]})
    hashes = [gather_teachers(plan(**change)).identities[0].sha256 for change in changes]
    assert len(set(hashes)) == len(changes)


@pytest.mark.parametrize("finetune", ["head", "all"])
def test_fine_tuning_begins_with_the_weights(plan, weights, finetune):
    _, module = weights
    (network,) = gather_teachers(plan(finetune=finetune)).members
    ours = {**network.stages.state_dict(), **network.neck.state_dict()}
    before = module.state_dict()
    names = {name: name.partition(".")[2] if name.startswith(("stem", "stage")) else name for name in ours}
    same = [torch.equal(value, before[names[name]]) for name, value in ours.items()]
    assert len(same) == len(before) - 2  # all but the head's weight and bias
    assert all(same) == (finetune == "head")  # batch norm's statistics among them
    assert not torch.equal(network.head.weight, module.classifier.weight)


def test_fine_tuned_teachers_are_kept_by_what_they_come_from(plan, data, weights, tmp_path):
    def kept():
        return {path.name for path in (tmp_path / "teachers").iterdir() if path.is_dir()}

    first = gather_teachers(plan(finetune="head")).identities[0]
    assert first.source == "trained"
    assert kept() == {first.detail["store_key"]}
    assert gather_teachers(plan(finetune="head")).identities[0] == first
    other = tmp_path / "mine.safetensors"  # of the same name
    _, module = weights
    state = {**module.state_dict(), "conv_stem.weight": module.conv_stem.weight.detach() * 2}
    safetensors.torch.save_file(state, other)
    keys = {first.detail["store_key"]}
    twice = tmp_path / "twice.pt"
    torch.save({"model": state, "mine": module.state_dict()}, twice)
    again = plan(finetune="head", weights=str(twice), state_key="mine")  # the same weights from another file
    assert gather_teachers(again).identities[0].detail["store_key"] == first.detail["store_key"]
    for changed in ({"weights": str(other)}, {"seed": 1}, {"recipe": {"lr": 0.01}}, {"finetune": "all"}):
        keys.add(gather_teachers(plan(**{"finetune": "head", **changed})).identities[0].detail["store_key"])
    assert kept() == keys
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"weights": "nowhere.pt"}, r"teachers.pool\[0\].weights=nowhere.pt: no such file \(or DEFAULT"),
        ({"timm": "resnet19"}, "unknown network of timm: 'resnet19'; did you mean"),
        ({"train": "resnet8"}, "give exactly one of zoo, file, train, timm, torchvision, module, hub"),
        ({"finetune": "heads"}, "finetune"),
        ({"seed": 1}, r"teachers.pool\[0\].seed has no effect together with timm"),
        ({"key_map": "own"}, r"teachers.pool\[0\].key_map has no effect together with timm"),
        ({"finetune": "all", "classes": [0]}, "classes has no effect together with finetune"),
        ({"stages": {"a": "nowhere"}}, "unknown submodule of MobileNetV3: 'nowhere'"),
        ({"image_size": 0}, "image_size"),
        ({"recipe": {"epochs": 0}, "finetune": "head"}, "epochs"),
        ({"recipe": {"epoch": 1}, "finetune": "head"}, "epoch"),
        (
            {"recipe": {"batch_size": 2000}, "finetune": "head"},
            r"^teachers\.recipe\.batch_size=2000 is larger than the ",
        ),
    ],
)
def test_an_impossible_entry_is_refused_before_anything_is_loaded(plan, entry, said):
    with pytest.raises(UserError, match=said):
        plan(**entry)


def test_a_teacher_of_other_classes_teaches_its_features(plan, tmp_path, data, caplog):
    torch.manual_seed(1)
    module = timm.create_model(NAME, num_classes=7).eval()
    safetensors.torch.save_file(module.state_dict(), tmp_path / "seven.safetensors")
    own = build_network(NetworkSpec("resnet8", 100, normalization("centered"))).eval()
    save_network(tmp_path / "own.safetensors", own)
    with caplog.at_level("INFO"):
        (library,) = plan(weights=str(tmp_path / "seven.safetensors"), image_size=64)
    assert "predicts 7 classes, the data has 10: it can teach features only" in caplog.text
    assert gather_teachers([library]).identities[0].detail["trained_on"] == "elsewhere"
    file = plan_teachers(TeacherSettings(pool=[{"file": str(tmp_path / "own.safetensors")}]), data, "cpu")[0]
    assert library.unknown == file.unknown == frozenset(range(10))
    teachers = gather_teachers([library, file])
    teachers.verify()
    images = torch.rand(2, 3, 64, 64)
    found = teachers(images)
    assert torch.equal(found.logits, torch.full((2, 2, 10), UNKNOWN_LOGIT))
    assert torch.equal(found.pooled[1], own.outputs(images).pooled)
    expected = module.forward_head(module.forward_features(teachers.members[0].normalize(images)), pre_logits=True)
    torch.testing.assert_close(found.pooled[0], expected)


def test_a_teacher_that_fails_on_the_images_is_refused_before_it_trains(tmp_path, data, monkeypatch):
    monkeypatch.setattr(registry, "NETWORKS", copy.copy(registry.NETWORKS))
    register_network("flat")(lambda spec: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, spec.num_classes)))
    settings = TeacherSettings(pool=[{"train": "resnet8"}, {"train": "flat"}], store=str(tmp_path))
    said = r"teachers.pool\[1\]: network 'flat' fails on images \[2, 3, 32, 32\]: RuntimeError: mat1 and mat2"
    with pytest.raises(UserError, match=said):
        plan_teachers(settings, data, "cpu")


def test_a_teacher_of_other_classes_without_a_linear_classifier_is_refused_at_once(tmp_path, data):
    spec = NetworkSpec("torchvision:squeezenet1_1", 7, normalization("centered"))
    save_network(tmp_path / "own.safetensors", build_network(spec))
    said = r"teachers.pool\[0\]: 'torchvision:squeezenet1_1' predicts 7 classes, the data has 10"
    with pytest.raises(UserError, match=said):
        plan_teachers(TeacherSettings(pool=[{"file": str(tmp_path / "own.safetensors")}]), data, "cpu")


def test_weights_of_other_classes_say_what_can_be_done(plan, tmp_path):
    path = tmp_path / "seven.safetensors"
    safetensors.torch.save_file(timm.create_model(NAME, num_classes=7).state_dict(), path)
    (planned,) = plan(weights=str(path))
    assert planned.unknown == frozenset(range(10))
    assert plan(weights=str(path), classes=[6, -1, 0, 1, 2, 3, 4, -1, 0, 0])[0].unknown == {1, 7}
    with pytest.raises(UserError, match=r"must be 10 positions in 0 .. 6"):
        plan(weights=str(path), classes=[7] * 10)
    (network,) = gather_teachers(plan(weights=str(path), finetune="head")).members
    assert network.head.out_features == 10


def test_what_a_teacher_does_not_know_is_refused_before_it_is_loaded(tiny_settings, weights, train, tmp_path, caplog):
    path, _ = weights
    seven = tmp_path / "seven.safetensors"
    safetensors.torch.save_file(timm.create_model(NAME, num_classes=7).state_dict(), seven)
    knows_nine = f"teachers.pool=[{{timm: {NAME}, weights: {path}, classes: [0, 1, 2, 3, 4, 5, 6, 7, 8, -1]}}]"
    knows_none = f"teachers.pool=[{{timm: {NAME}, weights: {seven}, image_size: 32}}]"
    features = [f"method.terms.{name}.weight=0" for name in ("kd_ensemble", "kd_branch")]
    mse = "method.terms.kd_ensemble.loss=mse_logits"
    for pool, said, words in (
        (knows_nine, "kd_ensemble compares .* does not know 1 of them", [mse]),
        (knows_none, "remove method.terms.kd_ensemble, method.terms.kd_branch,", []),
        (knows_none, "reuse_classifier=true: the teacher .*-seven. does not know all classes", ["method=simkd"]),
        (knows_nine, "kd_ensemble compares .* does not know 1 of them", ["method.assistants=[resnet8]", mse]),
        (
            knows_none.replace("]", ", {train: resnet8}]"),
            "-seven. predicts no class",
            ["method.teacher=best", *features],
        ),
    ):
        caplog.clear()
        with pytest.raises(UserError, match=said), caplog.at_level("INFO"):
            prepare(tiny_settings(pool, "data.val_fraction=0.2", *words), "cpu")
        assert ("does not know 1 of the data's classes: 9" in caplog.text) == (pool is knows_nine)
    outcome = train(tmp_path / "run", knows_none, *features, "evaluation.parts=[predictions]")
    assert outcome.code == 0, outcome.err
    result = outcome.json("result.json")
    assert (result["teachers"][0]["test_accuracy"], result["teachers"][0]["test_nll"]) == (None, None)
    assert result["evaluation_error"] is None
    assert result["test_branch_teacher_agreement"] is None
    assert len(result["test_branch_teacher_cka"]) == result["num_branches"]
