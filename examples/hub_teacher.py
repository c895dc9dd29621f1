"""A teacher from the Hugging Face hub, fine-tuned on your images; only safetensors are read, and no code."""

import sys

import ekd_lightning as ekd

repository, *words = sys.argv[1:]  # USER/REPO of a timm network, e.g. timm/resnet18.a1_in1k, or the folder of a copy
run = ekd.distill(
    "digits",
    teachers=[{"hub": repository, "finetune": "head", "image_size": 32}],
    student="resnet8",
    branches=2,
    overrides=["trainer=cpu", *words],
)
(teacher,) = run.result.teachers or []
print(f"{teacher['network']}: {100 * teacher['test_accuracy']:.1f} %")
print(f"student: {100 * run.result.test_accuracy:.1f} %")
