"""One small file per command; configuration is read here and nowhere below."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def _in_one_line(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Prints a line for Ctrl-C while a command's modules are imported; later `config.edge` does."""
    if kind is KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if Path(sys.argv[0]).name.startswith("ekd-"):
    sys.excepthook = _in_one_line
