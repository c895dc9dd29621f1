"""Few labels and many unlabelled images: teacher outputs on both train the student."""

import sys

import ekd_lightning as ekd

labelled, unlabelled, *words = sys.argv[1:]
run = ekd.distill(
    labelled,  # a folder: heron/0001.jpg, owl/0001.jpg, ...
    teachers=[{"train": "resnet14"}, {"train": "resnet20"}],  # trained on the labelled images alone
    student="resnet8",
    branches=2,
    epochs=60,
    overrides=["data.image_size=32", f"data.unlabelled={unlabelled}", "data.unlabelled_share=0.75", *words],
)
result = run.result
print(f"{result.num_train_images} labelled and {result.num_unlabelled_images} unlabelled images, {result.steps} steps")
print(f"test accuracy {100 * result.test_accuracy:.1f} %  {run.directory}")
