"""How should K branches be computed? A training step of a branched ResNet-8 in three ways.

    python benchmarks/branch_execution.py --output docs/results

One branch after another (what `BranchedStudent` does), the same compiled, and all branches as grouped convolutions,
written out here for this one network. Stacking by `torch.func` is not among them: under autocast on a processor a
convolution inside `torch.vmap` gets bfloat16 images and float32 weights and fails (torch 2.15).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ekd_lightning.bench import seconds_of, summary, take_turns
from ekd_lightning.networks import BranchedStudent, NetworkSpec, normalization
from ekd_lightning.runs.writer import provenance
from ekd_lightning.teachers.hardware import native_bfloat16

BATCH, STEPS = 128, 12


class GroupedBlock(nn.Module):
    """One residual block of all branches; the first one reads the trunk's output, which has no groups yet."""

    def __init__(self, inputs: int, outputs: int, branches: int, *, first: bool) -> None:
        super().__init__()
        groups, channels = (1, inputs) if first else (branches, inputs * branches)
        wide = outputs * branches
        self.conv1 = nn.Conv2d(channels, wide, 3, 2, 1, bias=False, groups=groups)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False, groups=branches)
        self.shortcut = nn.Conv2d(channels, wide, 1, 2, bias=False, groups=groups)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(wide) for _ in range(3))

    def forward(self, maps: Tensor) -> Tensor:
        new = functional.relu(self.bn1(self.conv1(maps)), inplace=True)
        return functional.relu(self.bn2(self.conv2(new)) + self.bn3(self.shortcut(maps)), inplace=True)


class Grouped(nn.Module):
    """The student with its branches side by side in the channels."""

    def __init__(self, student: BranchedStudent, branches: int) -> None:
        super().__init__()
        self.trunk, self.branches = student.trunk, branches
        first, second = (GroupedBlock(16, 32, branches, first=True), GroupedBlock(32, 64, branches, first=False))
        self.body = nn.Sequential(first, second)
        self.heads = nn.ModuleList(nn.Linear(64, 10) for _ in range(branches))

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.body(self.trunk(images)[0]).mean((-2, -1)).unflatten(1, (self.branches, 64))
        return torch.stack([head(pooled[:, k]) for k, head in enumerate(self.heads)])


def student(branches: int) -> BranchedStudent:
    torch.manual_seed(0)
    spec = NetworkSpec("resnet8", 10, normalization("cifar10"))
    return BranchedStudent(spec, branches=branches, split_after="stage1")


def rate(module: nn.Module, forward: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[], float]:
    """Measures images per second of whole training steps."""
    module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.rand(BATCH, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,), device=device)
    optimizer = torch.optim.SGD(module.parameters(), 0.01, momentum=0.9, nesterov=True, fused=True)

    def steps() -> None:
        for _ in range(STEPS):
            with torch.autocast(device.type, torch.bfloat16, enabled=native_bfloat16(device.type)):
                logits = forward(images)
            loss = functional.cross_entropy(logits.float().mean(0), labels)
            loss = loss + functional.cross_entropy(logits.float().flatten(0, 1), labels.repeat(len(logits)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return lambda: BATCH * STEPS / seconds_of(steps, device)


def measure(branches: int, device: torch.device, rounds: int) -> dict[str, Any]:
    torch.compiler.reset()
    one, two = student(branches), student(branches)

    def outputs(images: Tensor) -> Tensor:
        return two.outputs(images, ()).branch_logits

    grouped = Grouped(student(branches), branches)
    ways = {
        "one after another": rate(one, lambda images: one.outputs(images, ()).branch_logits, device),
        "one after another, compiled": rate(two, torch.compile(outputs, dynamic=False), device),
        "grouped convolutions": rate(grouped, grouped, device),
    }
    return summary(take_turns(ways, rounds), "one after another")


def page(found: dict[int, Any], origin: dict[str, Any], rounds: int) -> str:
    hardware = origin["hardware"]
    lines = ["| K | form | images/s | min – max | ratio |", "|---|---|---|---|---|"]
    for branches, rows in found.items():
        for name, row in rows.items():
            spread = f"{row['min']:,.0f} – {row['max']:,.0f}"
            lines.append(f"| {branches} | {name} | {row['median']:,.0f} | {spread} | {row['ratio']:.2f} |")
    return f"""# How K branches are computed

Made by `benchmarks/branch_execution.py`: training steps of a ResNet-8 split after stage 1, batch {BATCH}, medians of
{rounds} rounds in turn. {hardware["cpu"]}, {hardware["cpu_count"]} cores ({hardware["cpu_capability"]}),
{len(hardware["gpus"]) or "no"} GPU, torch {origin["packages"]["torch"]}.
The grouped form is written for this one network. Stacking by `torch.func`
does not work under autocast on a processor and is not measured.

{chr(10).join(lines)}

`BranchedStudent` computes one branch after another, which works for every network, keeps one set of names in
checkpoints, and compiles (`student.compile`).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {branches: measure(branches, device, args.rounds) for branches in (2, 3, 5)}
    args.output.mkdir(parents=True, exist_ok=True)
    text = page(found, provenance(), args.rounds)
    (args.output / "branch_execution.md").write_text(text)
    (args.output / "branch_execution.json").write_text(json.dumps(found, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
