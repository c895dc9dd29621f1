"""benchmarks/gpu.py: parts that fail cost their own figures, and the page says what was not measured."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ekd_lightning.bench.cost import KERNELS, by_group

HERE = Path(__file__).parents[2]
STEP = {"images_per_second": 40_000.0, "seconds_to_first_step": 2.5, "seconds_between_epochs": [0.03, 0.05]}
ORIGIN = {
    "hardware": {"gpus": ["NVIDIA H100"], "cpu": "A CPU", "cpu_count": 16},
    "packages": {"torch": "2.11.0", "pytorch-lightning": "2.6.6"},
    "git": {"commit": "0123456789abcdef"},
}


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts are no part of the package."""
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))


@pytest.fixture
def page() -> ModuleType:
    return importlib.import_module("gpu_page")


def found(**parts: Any) -> dict[str, Any]:
    told = {name: part if "result" in part else {"result": part} for name, part in parts.items()}
    return {"origin": ORIGIN, "settings": ["data=cifar10"], "seconds": 300.0, "parts": told}


def row(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_rates_stand_against_both_plain_loops(page: ModuleType) -> None:
    told = found(
        plain={"images_per_second": 5_000.0, "workers": 8},
        careful={"images_per_second": 10_000.0},
        **{"ours, captured": {"warm": STEP}, "graph": {"captured": {"images_per_second": 44_000.0}}},
    )
    steps, around = page.steps(told), page.around(told)
    assert row(steps, "ours, captured step, warm table") == ["40,000", "8.00", "4.00"]
    assert row(steps, "ours, captured step, cold table") == ["unmeasured"] * 3
    assert row(around, "between two epochs, without the validation") == ["40 ms"]
    assert row(around, "extra time of Lightning over the bare graph loop, captured step") == ["10.0 %"]
    assert row(around, "ours, captured, until the first step") == ["2.5 s"]


def test_maps_runs_at_once_and_kernels(page: ModuleType) -> None:
    runs = {"1": {"images_per_second": 30_000.0}, "8": {"images_per_second": 90_000.0}}
    told = found(
        many={"mps": False, "runs": runs},
        graph={"captured": {"profile": {"shares": {"convolutions, forward": 0.25}}}},
        **{"maps, camkd": {"ours": STEP, "plain": {"images_per_second": 8_000.0}}},
    )
    assert row(page.maps(told), "`method=camkd`") == ["8,000", "40,000", "5.00"]
    assert row(page.maps(told), "`method=fitnet`") == ["unmeasured"] * 3
    assert row(page.many(told), "processes") == ["30,000", "unmeasured", "unmeasured", "90,000"]
    assert row(page.profile(told), "convolutions, forward") == ["25.0 %", "unmeasured"]


def test_a_page_of_nothing_names_everything_as_unmeasured(page: ModuleType, tmp_path: Path) -> None:
    page.write(tmp_path, found(plain={"result": {}, "error": "took too long"}))
    text = (tmp_path / "speed_gpu.md").read_text()
    assert "NVIDIA H100" in text
    assert "- plain: took too long" in text
    tables = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    cells = [cell.strip() for line in tables for cell in line.split("|")[2:-1]]
    heads = {"", "time", "images/s", "× plain", "× careful", "ratio", "captured", "captured and compiled", *"1248"}
    assert {cell for cell in cells if not cell.endswith("images/s")} <= heads | {"unmeasured"}
    assert (tmp_path / "speed_gpu.json").is_file()
    assert "unmeasured" in page.table(found())


def test_later_files_fill_gaps_and_say_where_they_were_made(page: ModuleType) -> None:
    first = found(plain={"images_per_second": 5_000.0}, many={"result": {}, "error": "no time left"})
    later = found(
        plain={"images_per_second": 1.0},
        many={"mps": False, "runs": {"1": {"images_per_second": 30_000.0}}},
        command={"result": {}, "error": "took too long"},
    )
    told = page.merged([first, later, found(plain={"images_per_second": 2.0})])
    assert page.value(told, "plain", "images_per_second") == 5_000
    assert row(page.many(told), "processes")[0] == "30,000"
    assert [one["parts"] for one in told["also"]] == [["many"]]
    text = page.page(told)
    assert text.count("Measured in another run of the script") == 1
    assert "NVIDIA H100, commit 0123456789:\nprocesses at once." in text


def test_parts_that_a_later_file_had_from_others_keep_their_origin(page: ModuleType) -> None:
    origins = [ORIGIN | {"git": {"commit": letter * 40}} for letter in "abc"]
    empty = found(plain={"images_per_second": 1.0}) | {"origin": origins[0]}
    second = found(command={"cold": {}}, imports={"seconds": 1.0}) | {"origin": origins[1]}
    third = found(many={"runs": {}}, streams={"runs": {"1": {}}}) | {"origin": origins[2]}
    told = page.merged([empty, page.merged([second, third])])
    assert [(one["origin"]["git"]["commit"][0], one["parts"]) for one in told["also"]] == [
        ("b", ["command", "imports"]),
        ("c", ["many", "streams"]),
    ]


def test_rates_between_two_moments_are_interpolated() -> None:
    shared = importlib.import_module("gpu_shared")
    times, images = [0.0, 1.0, 3.0, 9.0, 10.0], [0, 100, 300, 300, 400]  # it waits from 3 to 9
    assert shared.between(times, images, 1.0, 3.0) == pytest.approx(100)
    assert shared.between(times, images, 2.0, 4.0) == pytest.approx(50)
    assert shared.between(times, images, 4.0, 8.0) == 0


def failing(part: Any) -> dict[str, Any]:
    part.told({"first": 1})
    part.turn()
    raise RuntimeError("no such kernel")


def hanging(part: Any) -> dict[str, Any]:
    part.told({"first": 2})
    part.turn()
    time.sleep(60)  # ended long before
    return {}


def fine(part: Any) -> dict[str, Any]:
    part.turn()
    return {"images_per_second": 1.0}


def test_parts_that_fail_or_hang_keep_what_they_had_found(tmp_path: Path) -> None:
    gpu = importlib.import_module("gpu")
    (tmp_path / "store").mkdir()
    args = argparse.Namespace(start="fork", tiny=True, overrides=[], patience=1.0, began=time.perf_counter())
    args.left = lambda: 30.0
    group = {"failing": (failing, 20.0), "hanging": (hanging, 1.0), "fine": (fine, 20.0)}
    told = gpu.run_group(group, args, tmp_path)
    assert told["failing"]["result"] == {"first": 1}
    assert told["failing"]["error"] == "RuntimeError: no such kernel"
    assert told["hanging"]["result"] == {"first": 2}
    assert told["hanging"]["error"] == "took too long"
    assert told["fine"]["result"] == {"images_per_second": 1.0}
    assert "error" not in told["fine"]


def test_a_run_takes_part_while_it_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = importlib.import_module("gpu_shared")
    wanted = SimpleNamespace(value=1)
    begun = SimpleNamespace(value=0, get_lock=contextlib.nullcontext)
    part = shared.TakesPart(1, wanted, begun, tmp_path / "run.json")
    trainer = SimpleNamespace(current_epoch=0, num_training_batches=4, datamodule=SimpleNamespace(batch_size=8))
    module = SimpleNamespace(device=torch.device("cpu"))

    def woken(_: float) -> None:
        wanted.value = 2

    monkeypatch.setattr(shared.time, "sleep", woken)
    part.on_train_epoch_start(trainer, module)  # the first epoch waits for nobody
    assert wanted.value == 1
    part.on_train_epoch_end(trainer, module)
    trainer.current_epoch = 1
    part.on_train_epoch_start(trainer, module)
    assert (begun.value, wanted.value) == (1, 2)
    assert part.images == [0, 32, 32]
    left: list[int] = []
    monkeypatch.setattr(shared.os, "_exit", left.append)
    wanted.value = -1
    part.on_train_epoch_start(trainer, module)
    assert left == [0]
    assert (tmp_path / "run.json").is_file()


def test_packages_without_bytecode_get_it_in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = importlib.import_module("gpu_shared")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    module = tmp_path / "torch/__init__.py"
    monkeypatch.setattr(torch, "__file__", str(module))
    told = shared._environment(tmp_path)
    assert told["PYTHONPYCACHEPREFIX"] == str(tmp_path / "bytecode")
    assert "PYTHONDONTWRITEBYTECODE" not in told
    cached = Path(importlib.util.cache_from_source(str(module)))
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert shared._environment(tmp_path) == dict(os.environ)


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("sm90_xmma_dgrad_implicit_gemm_indexed_bf16", "convolutions, backward"),
        ("cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized>", "convolutions, forward"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float>", "batch norm"),
        ("void at::native::multi_tensor_apply_kernel<FusedSgdMathFunctor>", "optimiser"),
        ("void at::native::vectorized_gather_kernel<16, long>", "gathering"),
        ("triton_poi_fused_relu_0", "compiled code"),
        ("void at::native::vectorized_elementwise_kernel<4, AddFunctor>", "other element-wise kernels"),
        ("something new", "everything else"),
    ],
)
def test_kernels_have_their_groups(kernel: str, group: str) -> None:
    assert by_group({kernel: 2.0}, KERNELS)[group] == 1.0
