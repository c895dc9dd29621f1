"""A plain Lightning Trainer and data loaders of (images, labels): student, teachers and method are yours."""

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import ekd_lightning as ekd
from ekd_lightning.data import load_dataset
from ekd_lightning.data.views import to_unit
from ekd_lightning.networks import NetworkSpec, normalization

digits = load_dataset("digits", "data")
train = TensorDataset(to_unit(digits.train.images), digits.train.labels)
test = TensorDataset(to_unit(digits.test.images), digits.test.labels)

torch.manual_seed(0)
spec = NetworkSpec("resnet8", num_classes=10, normalization=normalization("centered"), options={"width": 0.5})
members = [resnet18(num_classes=10) for _ in range(2)]  # stand for two trained networks, here of torchvision
teachers = ekd.TeacherEnsemble(members, normalization="imagenet")
student = ekd.BranchedStudent(spec, branches=2, split_after="stage1")
method = ekd.method("ekd", student, teachers)

module = ekd.Distiller(student, method, ekd.RecipeSettings(epochs=1, lr=0.05), teachers=teachers)
trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True, drop_last=True))
trainer.test(module, DataLoader(test, batch_size=120), verbose=False)
print(f"test accuracy {100 * float(trainer.callback_metrics['test/accuracy']):.1f} %")
