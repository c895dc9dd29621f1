"""`torch.compile` that costs a warning, not the run, where there is no working compiler."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch


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
