"""Hardware's abilities: what `precision: auto` means on this machine, and a compiler that may be missing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch


def native_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 is multiplied by the hardware: emulated, it is slower than float32.

    Args:
        device_type: "cpu" (which needs AVX512-BF16 or AMX) or "cuda"; anything else has not been measured.
    """
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    older = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # before torch told it in public
    return any(getattr(torch.cpu, name, bool)() for name in older)


def resolve_precision(precision: str | int | None, accelerator: str = "auto") -> str | int | None:
    """Turns `auto` into a Lightning precision; anything else passes through.

    bfloat16 autocast where the hardware multiplies bfloat16 natively, float32 elsewhere.

    Args:
        precision: `auto` or any value of Lightning's `precision` flag.
        accelerator: Lightning's `accelerator` flag.

    Returns:
        `bf16-mixed`, `32-true`, or `precision` itself.
    """
    if precision != "auto":
        return precision
    return "bf16-mixed" if native_bfloat16(device_type_of(accelerator)) else "32-true"


def device_type_of(accelerator: str) -> str:
    """The device type behind Lightning's `accelerator` flag on this machine, as far as we know it."""
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    return "cuda" if on_gpu else "cpu" if accelerator in ("auto", "cpu") else accelerator


def teacher_dtype(precision: str, device_type: str) -> torch.dtype:
    """What frozen teachers compute in: `teachers.precision` is auto, float32 or bfloat16."""
    if precision == "auto":
        return torch.bfloat16 if native_bfloat16(device_type) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def compiled_or_not(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiles a function for the shapes of its first call; without a working compiler it runs as it is.

    Args:
        function: What to compile.
        options: For `torch.compile`.

    Returns:
        The compiled function. If its first call fails, that call and all others go to `function`; a failure
        in compiling a backward pass shows later, and is not caught.
    """
    chosen: Callable[..., Any] = torch.compile(function, dynamic=False, **options)
    tried = False

    def call(*args: Any) -> Any:
        nonlocal chosen, tried
        if tried:
            return chosen(*args)
        tried = True
        try:
            return chosen(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C++ compiler, no Triton, a bug in a compiler: many kinds
            reason = " ".join(str(error).split())[:200]
            message = (
                f"torch.compile does not work here, so this runs slower ({type(error).__name__}: {reason})"
            )
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            chosen = function
            return chosen(*args)

    return call
