from __future__ import annotations

import pytest
import torch

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
