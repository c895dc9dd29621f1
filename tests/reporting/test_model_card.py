"""What a model card says follows from the record, and what is not known is not said."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from ekd_lightning.reporting.model_card import model_card, model_name

RECORD = """
class_names: [cat, dog, owl]
image_size: 32
library: {name: ekd-lightning, version: "1.2"}
spec: {network: {name: resnet20}, split_after: stage1, ensemble: mean_probs}
student: {branches: [0, 1], of_branches: 2, weights: last, sha256: abab, num_parameters: 12345, macs: 67890}
data: {name: cifar100, fraction: 0.05, num_train_images: 2250, num_val_images: 250, test_sha256: cd, subset_sha256: ef}
method: {name: ekd, temperature: 4.0, assignment: null, terms: {ce_branch: 0.1}, teachers: []}
recipe: {epochs: 3, batch_size: 32, lr: 0.05, schedule: cosine, momentum: 0.9, weight_decay: 0.0005}
seed: 7
test_metrics:
  {images: 100, accuracy: 0.5, top5: 0.9, nll: null, ece: 0.125, brier: 0.6, class_accuracy: [0.25, null, 0.75]}
run: {hardware: {cpu: Z80, threads: 1, gpus: []}, packages: {}}
files:
  student.onnx:
    {format: onnx, precision: float32, folded: false, outputs: [logits], bytes: 1500, accuracy: 0.5,
     accuracy_difference: 0.0, max_difference: 1.0e-6, tolerance: 1.0e-4, changed: 0, images: 100}
"""


def export(**student: Any) -> dict[str, Any]:
    made = yaml.safe_load(RECORD)
    return {**made, "student": made["student"] | student}


def test_the_header_is_what_the_hub_reads():
    card = model_card(export(), {}, license_id="apache-2.0")
    facts: Any = ModelCard(card).data  # as the hub reads it
    assert (facts.license, facts.datasets, facts.library_name) == ("apache-2.0", ["uoft-cs/cifar100"], "ekd-lightning")
    assert facts.pipeline_tag == "image-classification"
    assert facts.model_name == model_name(export()) == "ekd-cifar100-resnet20x2"
    assert {(one.dataset_name, one.dataset_type, one.dataset_split) for one in facts.eval_results} == {
        ("CIFAR-100", "uoft-cs/cifar100", "test")
    }
    # an NLL that was not finite is left out, not invented
    assert [(one.metric_type, one.metric_value) for one in facts.eval_results] == [
        ("accuracy", 0.5),
        ("expected_calibration_error", 0.125),
        ("brier_score", 0.6),
    ]


def test_what_the_text_says():
    card = model_card(export(), {"train_seconds": 12.4, "corruption_mce": 0.4, "corruption_source": "regenerated"})
    for said in (
        "learned from labels alone",
        "the logarithm of the mean of their probabilities",
        "2,500 labelled images (5 % of the training set), 250 of them for validation",
        "n = 1, seed 7",
        "| top-5 accuracy | 90.00 % |",
        "| NLL (nats) | not known |",
        "weakest on cat (25.00 %) and owl (75.00 %), strongest on owl",
        "corrupted test images (regenerated)",
        "Training took 12 s on Z80",
        "no temperature has been fitted",
    ):
        assert said in card, said
    for unsaid in ("debugging", "frozen teacher", "None", "Teachers had seen", "torch.export program"):
        assert unsaid not in card, unsaid


def test_a_network_with_options_is_not_taken_for_the_usual_one():
    usual, narrow = export(), export()
    narrow["spec"]["network"]["options"] = {"width": 0.9375}
    assert "student (`width=0.9375`; " in model_card(narrow, {})
    assert "width" not in model_card(usual, {})


@pytest.mark.parametrize(("student", "said"), [({}, True), ({"branches": [1]}, False), ({"weights": "best"}, False)])
def test_what_holds_of_the_whole_student_is_not_said_of_a_part(student, said):
    found = {
        "calibration_temperature": 1.7,
        "test_ece_calibrated": 0.01,
        "latency_ms_batch1": 2.5,
        "efficiency_device": "cpu",
        "efficiency_threads": 1,
    }
    card = model_card(export(**student), found)
    assert ("dividing the logits by 1.7" in card) == said
    assert ("2.50 ms" in card) == (student.get("branches") is None)


@pytest.mark.parametrize(
    ("weights", "said"),
    [("last", "last epoch"), ("best", "epoch with the best validation accuracy"), ("ema", "moving average")],
)
def test_the_card_names_the_weights(weights, said):
    card = model_card(export(weights=weights), {})
    assert said in card
    assert ("best validation accuracy" in card) == (weights == "best")


def test_only_sgd_has_a_momentum():
    record = export()
    assert "momentum 0.9" in model_card(record, {})
    card = model_card({**record, "recipe": {**record["recipe"], "optimizer": "adamw"}}, {})
    assert "optimiser `adamw`" in card
    assert "momentum" not in card


def test_a_debugging_run_is_called_one():
    assert "debugging run" in model_card(export(), {"partial": True})


def test_teachers_that_saw_everything_are_told_of():
    record = export()
    big = {"id": "big", "sha256": "12" * 32, "source": "zoo", "trained_on": "published"}
    record["method"]["teachers"] = [big]
    card = model_card(record, {})
    assert "learned from 1 frozen teacher with" in card
    assert "| `big` |  | not known | published | `1212121212121212…` |" in card
    assert "Teachers had seen all training images" in card
    assert "is not recorded" not in card
    own = [{**big, "id": "own", "source": "timm", "trained_on": "elsewhere"}, {"id": "small", "trained_on": "subset"}]
    record["method"]["teachers"] = [big, *own]
    card = model_card(record, {})
    assert "- `big` had seen all training images" in card
    assert "- Which images `own` had seen is not recorded; test images may be among them." in card
    record["method"]["teachers"] = own[1:]
    assert "had seen" not in model_card(record, {})
