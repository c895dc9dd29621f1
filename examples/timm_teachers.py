"""Networks of timm as teachers, fine-tuned on your images, and a network of timm cut into trunk and branches."""

import sys

import ekd_lightning as ekd

weights, *words = sys.argv[1:]  # a file of weights, or DEFAULT for those that timm publishes
network = "mobilenetv3_small_050"
run = ekd.distill(
    "digits",
    teachers=[
        {"timm": network, "weights": weights, "finetune": "head", "image_size": 32},
        {"timm": network, "weights": weights, "finetune": "all", "image_size": 32, "seed": 1},
    ],
    student=f"timm:{network}",
    split_after="stage3",
    branches=2,
    overrides=["trainer=cpu", *words],
)
for teacher in run.result.teachers or []:
    print(f"{teacher['id']}: {100 * teacher['test_accuracy']:.1f} %")
print(f"student: {100 * run.result.test_accuracy:.1f} %")
