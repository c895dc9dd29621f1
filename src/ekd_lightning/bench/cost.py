"""Cost parts of the benchmark: inference, memory, growth, share of the peak, shares of a step's time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from ekd_lightning.bench import matmul_peak, rate_of, seconds_of, summary, take_turns
from ekd_lightning.bench.ours import BareLoop
from ekd_lightning.bench.parts import Bench
from ekd_lightning.config.overrides import override
from ekd_lightning.data import open_dataset
from ekd_lightning.data.views import to_unit
from ekd_lightning.evaluation.efficiency import count_macs, count_parameters
from ekd_lightning.networks.frozen import FrozenNetwork, FrozenStudent
from ekd_lightning.settings import DataSettings
from ekd_lightning.teachers.hardware import compiled_or_not, teacher_dtype

_FORMS = ("plain", "folded", "compiled")


class _Mean(nn.Module):
    """An ensemble of networks in deployment: the mean of their logits."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs = [member(images) for member in self.members]
        return torch.stack([one[0] if isinstance(one, tuple) else one for one in outputs]).mean(0)


@torch.no_grad()
def inference(bench: Bench) -> dict[str, Any]:
    """(e) The student against each teacher and the ensemble of all: batch 1 and 128, plain, folded, compiled."""
    student = bench.job().prepared().student.to(bench.device).eval()
    networks = list(bench.teachers.to(bench.device).members)
    dtype = teacher_dtype("auto", bench.device.type)
    folded = [FrozenNetwork(network, dtype=dtype) for network in networks]
    names = ["student", *(identity.id for identity in bench.teachers.identities), "teacher ensemble"]
    plain: dict[str, nn.Module] = dict(zip(names, (student, *networks, _Mean([*networks])), strict=True))
    fast = dict(zip(names, (FrozenStudent(student, dtype=dtype), *folded, _Mean([*folded])), strict=True))
    result: dict[str, Any] = {"unit": "images/s", "format": str(dtype).removeprefix("torch."), "batches": {}}
    over = result["student_over_ensemble_in_the_same_form"] = {}
    for batch in (1, 128):
        images = bench.dataset.test.images[:batch].float().div(255).to(bench.device)
        alternatives: dict[str, Callable[[], float]] = {}
        for name, network in plain.items():
            compiled = compiled_or_not(fast[name], options={"freezing": True})
            forms: dict[str, Callable[..., object]] = {"plain": network, "folded": fast[name], "compiled": compiled}
            for form, module in forms.items():
                alternatives[f"{name}, {form}"] = rate_of(partial(module, images), batch, bench.device)
        rates = take_turns(alternatives, bench.rounds)
        result["batches"][str(batch)] = summary(rates, "teacher ensemble, plain")
        over[str(batch)] = {
            form: summary(rates, f"teacher ensemble, {form}")[f"student, {form}"]["ratio"] for form in _FORMS
        }
        torch.compiler.reset()
    result["parameters"] = {name: count_parameters(module) for name, module in plain.items()}
    result["macs"] = {name: count_macs(module, bench.dataset.image_size) for name, module in plain.items()}
    return result


_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss
_CHILD = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def memory(bench: Bench) -> dict[str, Any]:
    """(f) Peak resident memory of `ekd-train` with the same overrides, for one epoch, in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*bench.overrides, "recipe.epochs=1", override("hydra.run.dir", folder)]
        command = [sys.executable, "-c", _CHILD, sys.executable, "-m", "ekd_lightning.cli.train", *words]
        last = _output_of(command)[-1]
    return {"run_gb": int(last) * _RSS_UNIT / 1e9}


def _output_of(command: Sequence[str]) -> list[str]:
    """Lines that a command prints; an interrupt ends it with all processes that it has started.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, err)
    return out.splitlines()


_BETWEEN = "import subprocess, sys; subprocess.run(sys.argv[1:], check=True)"
_LOADER = """
import json, resource, sys
from ekd_lightning.bench import cost
seconds = getattr(cost, sys.argv[1])(*sys.argv[2:])
own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps([seconds, own, child]))
"""
_FILE_SIZE, _LOADED_SIZE, _LOADED_BATCH = (320, 256), 64, 128  # pixels, pixels, images


def folder_loading(bench: Bench) -> dict[str, Any]:
    """(l) Loading of a folder of JPEG files in shuffled batches: cold cache, warm cache, and ImageFolder in workers.

    Files have 320×256 pixels and are loaded as squares of 64. Each measurement runs in a separate process, without its
    imports; the memory of workers is that of the largest one times their number.
    """
    memory_gb: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder, "images"), Path(folder, "cache")
        write_folder(bench, root)

        def rate(name: str, *words: object, workers: int = 0) -> float:
            # A small process in between: on Linux a process inherits the peak memory of its parent.
            command = [sys.executable, "-c", _BETWEEN, sys.executable, "-c", _LOADER, *map(str, words)]
            seconds, own, child = json.loads(_output_of(command)[-1])
            used = (own + workers * child) * _RSS_UNIT / 1e9
            memory_gb[name] = max(used, memory_gb.get(name, 0.0))
            return bench.folder_images / seconds

        def cold() -> float:
            shutil.rmtree(cache, ignore_errors=True)
            return rate("cold cache", "load_cached", root, cache)

        plain: dict[str, Callable[[], float]] = {
            f"ImageFolder, {count} workers": partial(
                rate, f"ImageFolder, {count} workers", "load_plain", root, count, workers=count
            )
            for count in bench.workers
        }
        own: dict[str, Callable[[], float]] = {
            "cold cache": cold,
            "warm cache": partial(rate, "warm cache", "load_cached", root, cache),
        }
        rates = take_turns({**plain, **own}, bench.rounds, warm_up=False)
    best = max(plain, key=lambda name: statistics.median(rates[name]))
    return {
        "unit": "images/s",
        "images": bench.folder_images,
        "best": best,
        "rates": summary(rates, best),
        "memory_gb": memory_gb,
    }


def write_folder(bench: Bench, root: Path) -> None:
    """Writes `bench.folder_images` JPEG files into two class folders, repeating the data set's images if necessary."""
    images = bench.dataset.train.images
    for number in range(bench.folder_images):
        file = root / f"class{number % 2}" / f"{number:06}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = images[number % len(images)].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize(_FILE_SIZE, Image.Resampling.BICUBIC).save(file, quality=90)


def load_cached(root: str, cache: str) -> float:
    """Seconds in which this package loads every image of a folder once, including decoding if the cache is cold."""

    def load() -> None:
        settings = DataSettings("bench", "folder", root, cache=cache, image_size=_LOADED_SIZE)
        dataset = open_dataset(settings)
        for images in (dataset.train.images, dataset.test.images):
            for index in torch.randperm(len(images)).split(_LOADED_BATCH):
                to_unit(images[index])

    return seconds_of(load)


def load_plain(root: str, workers: str) -> float:
    """Seconds in which torchvision's ImageFolder and a DataLoader with `workers` workers load every image once."""

    def load() -> None:
        steps = [transforms.Resize(_LOADED_SIZE), transforms.CenterCrop(_LOADED_SIZE), transforms.ToTensor()]
        folder = ImageFolder(root, transforms.Compose(steps))
        for _ in DataLoader(folder, _LOADED_BATCH, shuffle=True, num_workers=int(workers)):
            pass

    return seconds_of(load)


def growth(bench: Bench) -> dict[str, Any]:
    """(g) How the speed of training changes with M, K, the batch size and the number of images; warm tables."""
    result: dict[str, Any] = {"unit": "images/s"}
    # Not compiled, because the time of tracing would count more in short epochs than in long ones.
    settings = replace(bench.settings, student=replace(bench.settings.student, compile="never"))
    with tempfile.TemporaryDirectory() as folder:

        def rate(teachers: int | None = None, **changes: Any) -> float:
            job = bench.job(replace(settings, **changes), teachers).with_store(Path(folder))
            job.fit()
            return job.fit().images_per_second

        result["teachers"] = {m: rate(m) for m in range(1, bench.teachers.num_teachers + 1)}
        result["branches"] = {k: rate(student=replace(settings.student, branches=k)) for k in (1, 2, 3, 4, 6)}
        present = len(bench.job().prepared().subset.train_index)
        result["batch_size"] = {
            b: rate(recipe=replace(settings.recipe, batch_size=b)) for b in (32, 64, 128, 256, 512) if b <= present
        }
        whole = len(bench.dataset.train)
        result["images"] = {
            round(whole * share): rate(data=replace(settings.data, fraction=share, per_class=None))
            for share in (0.02, 0.1, 0.3)
            if 0.8 * whole * share > settings.recipe.batch_size
        }
    return result


def peak_share(bench: Bench, teachers: dict[str, Any], epoch: dict[str, Any]) -> dict[str, Any]:
    """(h) Share of the measured matrix-product peak, from parts b and c; a step counts as three forward passes."""
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    peaks = {name: matmul_peak(dtype, bench.device) for name, dtype in formats.items()}
    format_ = str(teacher_dtype("auto", bench.device.type)).removeprefix("torch.")
    work = {"student_training": 3 * count_macs(bench.job().prepared().student) * epoch["rates"]["warm table"]["median"]}
    for identity, network in zip(bench.teachers.identities, bench.teachers.members, strict=True):
        rate = teachers["teachers"][identity.id]["rates"]["auto folded, compiled"]["median"]
        work[f"teacher {identity.id}"] = count_macs(network) * rate
    return {
        "peak_gmacs": {name: value / 1e9 for name, value in peaks.items()},
        "format": format_,
        **{name: macs / peaks[format_] for name, macs in work.items()},
    }


GROUPS = {
    "convolutions, backward": ("convolution_backward",),
    "convolutions, forward": ("mkldnn_convolution", "cudnn_convolution", "conv2d", "aten::convolution"),
    "batch norm, activations and other compiled code": ("CompiledFxGraph", "batch_norm", "triton_"),
    "optimiser": ("_fused_sgd", "Optimizer."),
}
"""Substrings of operators' names; the first group that matches counts."""

KERNELS = {
    "convolutions, backward": ("dgrad", "wgrad", "convolve_common_engine", "bprop"),
    "convolutions, forward": ("fprop", "implicit_convolve", "winograd", "conv2d", "convolve", "xmma", "cutlass_"),
    "batch norm": ("batch_norm", "bn_fw", "bn_bw", "batchnorm"),
    "compiled code": ("triton_",),
    "optimiser": ("FusedSgd", "fused_sgd", "multi_tensor_apply"),
    "gathering": ("index_select", "indexSelect", "gather", "index_elementwise", "index_kernel"),
    "matrix products": ("gemm", "gemv", "splitKreduce"),
    "copies and formats": ("Memcpy", "Memset", "copy_kernel", "nchwToNhwc", "nhwcToNchw", "transpose", "CatArray"),
    "losses and other reductions": ("softmax", "SoftMax", "reduce_kernel", "nll_loss"),
    "other element-wise kernels": ("elementwise",),
}
"""Substrings of CUDA kernels' names; the first group that matches counts."""

OTHER = "everything else"


def step_profile(bench: Bench) -> dict[str, Any]:
    """(p) Shares of a training epoch's time with warm tables, by the torch profiler.

    Returns:
        The rate without the profiler, each group's share in [0, 1] of the operators' own time with it, and the
        rate that is left if nothing but the convolutions took time: a bound for this machine's kernels.
    """
    with tempfile.TemporaryDirectory() as folder:
        loop = BareLoop(bench.job().with_store(Path(folder)))
        loop.images_per_second(1)  # fills the table and compiles
        rate = loop.images_per_second(1)
        shares = time_shares(lambda: loop.images_per_second(1), bench.device)["shares"]
    convolutions = shares["convolutions, backward"] + shares["convolutions, forward"]
    return {
        "unit": "images/s",
        "rate": rate,
        "shares": shares,
        "rate_of_the_convolutions_alone": rate / convolutions if convolutions else None,
    }


def time_shares(work: Callable[[], object], device: torch.device, most: int = 15) -> dict[str, Any]:
    """Measures each group's share of the time, by kernels on a GPU and by operators on a CPU.

    Returns:
        Shares in [0, 1] by group, the largest kernels in microseconds with their number of calls, and the share of
        the elapsed time in which any kernel ran.
    """
    on_gpu = device.type == "cuda"
    kind, groups = (DeviceType.CUDA, KERNELS) if on_gpu else (DeviceType.CPU, GROUPS)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        seconds = seconds_of(work, device)
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in recorded.key_averages() if event.device_type == kind]
    events.sort(key=lambda event: -getattr(event, field))
    times = {event.key: float(getattr(event, field)) for event in events}
    return {
        "shares": by_group(times, groups),
        "busy": sum(times.values()) / 1e6 / seconds,
        "kernels": [[event.key[:120], times[event.key], int(event.count)] for event in events[:most]],
    }


def by_group(times: Mapping[str, float], groups: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    """Returns each group's share of the whole time in [0, 1], from the times of operators or kernels by name."""
    sums = dict.fromkeys([*groups, OTHER], 0.0)
    for name, value in times.items():
        fitting = (group for group, parts in groups.items() if any(part in name for part in parts))
        sums[next(fitting, OTHER)] += value
    whole = sum(sums.values())
    return {group: value / whole if whole else 0.0 for group, value in sums.items()}
