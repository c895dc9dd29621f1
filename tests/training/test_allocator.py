from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from ekd_lightning.training import allocator

GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"

FAULTS = """
import resource
import torch
from ekd_lightning.training.allocator import keep_freed_memory

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
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()
