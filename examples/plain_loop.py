"""A plain PyTorch loop: student, teachers and method are modules like any other."""

import torch
from torchvision.models import resnet18

import ekd_lightning as ekd
from ekd_lightning.data import load_dataset
from ekd_lightning.data.views import to_unit
from ekd_lightning.networks import NetworkSpec, normalization

digits = load_dataset("digits", "data").train
images, labels = to_unit(digits.images), digits.labels

torch.manual_seed(0)
spec = NetworkSpec("resnet8", num_classes=10, normalization=normalization("centered"), options={"width": 0.5})
members = [resnet18(num_classes=10) for _ in range(2)]  # stand for two trained networks, here of torchvision
teachers = ekd.TeacherEnsemble(members, normalization="imagenet")
student = ekd.BranchedStudent(spec, branches=2, split_after="stage1")
method = ekd.method("ekd", student, teachers)
optimizer = torch.optim.SGD([*student.parameters(), *method.parameters()], lr=0.05, momentum=0.9)

for step, index in enumerate(torch.randperm(len(labels)).split(64)):
    x, y = images[index], labels[index]
    loss = method(student.outputs(x), teachers(x, method.teacher_stages), (x, y))
    optimizer.zero_grad()
    loss.total.backward()
    optimizer.step()
    if step % 5 == 0:
        print(
            f"step {step:2}  loss {loss.total.detach():.3f}  "
            + "  ".join(f"{k} {v:.3f}" for k, v in loss.terms.items())
        )
