"""What the hardware can do: a precision, free threads, and memory that is kept."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from ekd_lightning.errors import UserError
from ekd_lightning.teachers import hardware
from ekd_lightning.teachers.hardware import resolve_precision


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", 16, None])
def test_anything_but_auto_passes_through(precision):
    assert resolve_precision(precision, "cpu") == precision


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({}, "32-true"),
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": True}, "bf16-mixed"),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, "32-true"),
    ],
)
def test_auto_on_a_processor(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_precision("auto", "cpu") == expected
    assert resolve_precision("auto", "auto") == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "auto"])
def test_auto_on_cuda(monkeypatch, native, expected, accelerator):
    asked = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return native

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve_precision("auto", accelerator) == expected
    assert asked == [False]  # emulated bfloat16 does not count


def test_a_processor_is_not_asked_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_precision("auto", "gpu") == "32-true"
    assert resolve_precision("auto", "mps") == "32-true"


@pytest.fixture
def eight_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(hardware, "usable_cores", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    yield
    torch.set_num_threads(before)


def choose(asked=None, recorded=None, device_type="cpu", num_devices=1) -> int:
    chosen = hardware.set_threads(asked, recorded, device_type=device_type, num_devices=num_devices)
    assert torch.get_num_threads() == chosen
    return chosen


@pytest.mark.parametrize(("busy", "left"), [(0, 8), (3, 5), (7, 1), (8, 1), (40, 1)])
@pytest.mark.usefixtures("eight_cores")
def test_what_is_busy_is_left_to_others(monkeypatch, busy, left, caplog):
    monkeypatch.setattr(hardware, "busy_threads", lambda: busy)
    with caplog.at_level("INFO"):
        assert choose() == left
    assert [f"8 cores, {busy} of them busy" in record.message for record in caplog.records] == [True]


@pytest.mark.usefixtures("eight_cores")
def test_jobs_on_the_other_cores_of_a_shared_machine_do_not_count(monkeypatch, caplog):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(hardware, "busy_threads", lambda: 40)
    with caplog.at_level("INFO"):
        assert choose() == 8
    assert "8 threads: this process's share of 64 cores" in caplog.text  # and not that none is busy


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ({"asked": 3}, 3),
        ({"asked": 3, "recorded": 5}, 3),
        ({"recorded": 5}, 5),
        ({"num_devices": 3}, 2),
        ({"num_devices": 20}, 1),
    ],
)
@pytest.mark.usefixtures("eight_cores")
def test_what_is_known_is_taken(monkeypatch, arguments, chosen):
    monkeypatch.setattr(hardware, "busy_threads", lambda: 1)
    assert choose(**arguments) == chosen


@pytest.mark.usefixtures("eight_cores")
def test_accelerators_and_the_environment_are_left_alone(monkeypatch):
    before = torch.get_num_threads()
    assert choose(device_type="cuda") == before
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert choose() == before


@pytest.mark.parametrize("environment", [None, "5"])
@pytest.mark.usefixtures("eight_cores")
def test_a_job_leaves_the_threads_of_the_next_one_alone(monkeypatch, environment):
    before = torch.get_num_threads()
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    with hardware.threads_as_before():
        choose(before + 1, num_devices=2)
        assert os.environ["OMP_NUM_THREADS"] == str(before + 1)
    assert (torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")) == (before, environment)


@pytest.mark.parametrize("asked", [0, -1, 1.5, True, "two"])
@pytest.mark.usefixtures("eight_cores")
def test_no_number_of_threads_is_refused(asked):
    with pytest.raises(UserError, match=r"trainer\.threads"):
        choose(asked=asked)


@pytest.mark.skipif(not os.path.exists("/proc/loadavg"), reason="the system does not tell what runs")
def test_a_busy_process_is_seen():
    spinning = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=-1)
    try:
        spinning.stdout.read(1)
        assert hardware.busy_threads() >= 1
    finally:
        spinning.kill()
        spinning.wait()


@pytest.mark.usefixtures("eight_cores")
def test_a_resumed_run_takes_the_threads_it_had(train, resume, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "usable_cores", lambda: 3)  # more threads than real cores are slow
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(hardware, "busy_threads", lambda: 1)
    stopped = train(tmp_path / "run", "recipe.epochs=2", "trainer.max_steps=4")
    assert stopped.json("provenance.json")["threads"] == 2
    monkeypatch.setattr(hardware, "busy_threads", lambda: 0)
    assert resume(tmp_path / "run", "trainer.max_steps=-1").json("provenance.json")["threads"] == 2
    new = train(tmp_path / "new")
    assert new.json("provenance.json")["threads"] == 3
    own = train(tmp_path / "own", "trainer.threads=1")
    assert own.json("provenance.json")["threads"] == 1


GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"

FAULTS = """
import resource
import torch
from ekd_lightning.teachers.hardware import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

assert keep_freed_memory()
for _ in range(20):
    before = faults()
    parts = [torch.ones(2**20) for _ in range(16)]
    del parts
    last = faults() - before
print(last)
"""


@pytest.mark.skipif(not GLIBC, reason="no glibc")
def test_memory_is_mapped_once():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # 64 MB are 16,384 pages


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(hardware.sys, "platform", "darwin")
    assert not hardware.keep_freed_memory()
