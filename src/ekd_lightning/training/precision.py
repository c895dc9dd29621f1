"""What `precision: auto` means on this machine."""

from __future__ import annotations

import torch


def resolve_precision(precision: str | int | None, accelerator: str = "auto") -> str | int | None:
    """Turns `auto` into a Lightning precision; anything else passes through.

    bfloat16 autocast where the hardware multiplies bfloat16 natively (CUDA devices that support it; CPUs with
    AVX512-BF16 or AMX), float32 elsewhere: emulated bfloat16 is slower than float32.

    Args:
        precision: `auto` or any value of Lightning's `precision` flag.
        accelerator: Lightning's `accelerator` flag.

    Returns:
        `bf16-mixed`, `32-true`, or `precision` itself.
    """
    if precision != "auto":
        return precision
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    if on_gpu:
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        native = accelerator in ("auto", "cpu") and bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return "bf16-mixed" if native else "32-true"
