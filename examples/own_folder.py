"""Images of your own, one subfolder per class: one call trains the teachers and distils the student."""

import sys

import ekd_lightning as ekd

if len(sys.argv) == 1:
    sys.exit(f"usage: {sys.argv[0]} FOLDER [EPOCHS] [KEY=VALUE ...]")
run = ekd.distill(
    sys.argv[1],  # a folder: heron/0001.jpg, owl/0001.jpg, ...
    teachers=[{"train": "resnet14"}, {"train": "resnet20"}],
    student="resnet8",
    branches=2,
    epochs=int(sys.argv[2]) if len(sys.argv) > 2 else 60,
    overrides=["data.image_size=32", *sys.argv[3:]],
)
print(f"test accuracy {100 * run.result.test_accuracy:.1f} %  {run.directory}")
print(f"next: ekd-export {run.directory} --format onnx -o student")
