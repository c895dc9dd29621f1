"""Files that are replaced atomically and hold a checksum: a kill or a full disk leaves the old file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import stat
import uuid
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from ekd_lightning.errors import UserError

SEAL = "ekd_sha256"
"""The name under which a sealed file holds its checksum."""
_OPEN, _MARK = "0" * 64, "=sealed"
UNSEALED = _OPEN + _MARK
"""Placeholder of the checksum until `seal` fills it in. Its mark stays, and betrays a file whose `SEAL` was damaged."""

_SEALED = re.compile(SEAL.encode() + rb"[^0-9a-f]{1,5}([0-9a-f]{64})")
_PART = ".part-"
_LONGEST = 100  # bytes of a text in the name of a file
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where libyaml is there


class DamagedFileError(UserError):
    """A file whose content is not what was written; some callers can make it again."""


class UnwritableFileError(UserError, OSError):
    """A file that cannot be written because the disk is full, read-only or broken; the old file is unchanged."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file that takes the place of `path` when the block has written it and the disk holds it.

    At every instant `path` is the old file or the new one, even after a power cut. The folder is made if missing.

    Yields:
        Path of the temporary file: empty, in the same folder, with the same suffix.

    Raises:
        UnwritableFileError: If the disk refuses (full, read-only, ...), naming `path`, which is then unchanged.
    """
    temporary = path.with_name(f"{_PART}{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UnwritableFileError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def distinct_name(text: str, replaced: str) -> str:
    """A short name of a file, without ending, for any text: the text itself, or one with a checksum.

    Another text, e.g. another name of a data set, gets another name. What matches the pattern `replaced` becomes `_`.
    """
    name = re.sub(replaced, "_", text).encode()[:_LONGEST].decode(errors="ignore")
    return name if name == text else f"{name}-{zlib.crc32(text.encode()):08x}"


def remove_parts(folder: Path, name: str = "") -> None:
    """Removes temporary files of killed writers from a folder, those of one file or all.

    Only for files with one writer at a time, as the files of a live writer would go, too.
    """
    if folder.is_dir():
        for part in folder.iterdir():
            if part.name.startswith(_PART) and part.name.endswith(f".{name}" if name else ""):
                part.unlink(missing_ok=True)


def move_folder(source: Path, target: Path) -> None:
    """Renames a folder whose files are written and synced, so that it appears whole or not at all.

    If the file system refuses, it raises an UnwritableFileError that names the target.
    """
    try:
        _sync_folder(source)
        os.replace(source, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise UnwritableFileError(f"{target}: cannot be written ({error.strerror or error})") from error


def read_bytes(path: Path) -> bytes:
    """Reads a whole file. A device or a pipe in its place is refused: reading it might never end.

    Raises:
        FileNotFoundError: If nothing is there.
        DamagedFileError: If it is not a regular file, or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DamagedFileError(f"{path}: damaged, not a regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFileError(f"{path}: cannot be read ({error.strerror or error})") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` as JSON with its own checksum, for `read_json`; see `replacing`.

    Non-finite numbers become null: JSON has no word for them.
    """
    text = json.dumps(_finite({**content, SEAL: UNSEALED}), indent=2, allow_nan=False) + "\n"
    write_bytes(path, seal(text.encode()))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a mapping that `write_json` wrote, and checks its checksum if it has one.

    Raises:
        DamagedFileError: If it is not JSON, not a mapping, not what was written, or cannot be read.
        FileNotFoundError: If there is no such file.
    """
    text = read_bytes(path)
    require_intact(path, text)
    try:
        content = json.loads(text, parse_constant=lambda _: None)  # NaN, as `write_json` has it
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: damaged, not JSON ({error})") from None
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path}: damaged, not a mapping but a {type(content).__name__}")
    content.pop(SEAL, None)
    return content


def write_yaml(path: Path, text: str) -> None:
    """Writes YAML below a comment with its own checksum, for `read_yaml`; see `replacing`."""
    head = f"# {SEAL}: {UNSEALED}; delete this line if you change the file\n"
    write_bytes(path, seal(f"{head}{text}".encode()))


def _repeated_key(root: yaml.Node | None) -> yaml.ScalarNode | None:
    """A key that a mapping has twice, where YAML would silently take the last one; None without any."""
    left, known = [] if root is None else [root], set[int]()
    while left:
        node = left.pop()
        if id(node) in known:  # an alias
            continue
        known.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.MappingNode):
            seen = set[tuple[str, str]]()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                    return key
                seen.add((key.tag, str(key.value)))
                left += [key, value]
    return None


def read_yaml(path: Path) -> Any:
    """Reads plain values from YAML, and checks its checksum if it has one; YAML tags never make objects.

    Raises:
        DamagedFileError: If it is not YAML, has a key twice, is not what was written, or cannot be read.
        FileNotFoundError: If there is no such file.
    """
    text = read_bytes(path)
    require_intact(path, text)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            repeated = _repeated_key(node)
            content = None if node is None or repeated else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = str(error).splitlines()[0]
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            what = f"{error.problem}, line {error.problem_mark.line + 1}"
        raise DamagedFileError(f"{path}: damaged, not YAML ({what})") from None
    if repeated is not None:
        line = repeated.start_mark.line + 1
        raise DamagedFileError(f"{path}: the key {repeated.value!r} is there twice (line {line}); remove one")
    return content


def write_text(path: Path, text: str) -> None:
    """Writes `text` in UTF-8; see `replacing`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Writes `content`; see `replacing`."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)


class BackgroundWriter:
    """Writes files in a background thread, in the order of the calls; the caller does not wait for the disk.

    The next call raises the error of an earlier write. The thread ends with `close`, and starts again when needed.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[tuple[Path, Future[None]]] = []

    def submit(self, path: Path, write: Callable[[], None]) -> None:
        """Queues `write`, which writes `path`; raises the UnwritableFileError of an earlier write that failed."""
        self.wait()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "files")
        self._pending.append((path, self._thread.submit(write)))

    def wait(self, *paths: Path) -> None:
        """Waits for all queued writes of `paths`.

        If one of these, or of the others that have ended, has failed, it raises their UnwritableFileError.
        """
        ended = [write for path, write in self._pending if path in paths or write.done()]
        self._pending = [(path, write) for path, write in self._pending if write not in ended]
        for error in [write.exception() for write in ended]:
            if error is not None:
                raise error

    def close(self) -> None:
        """Waits until everything is written; raises the UnwritableFileError of a write that failed."""
        try:
            self.wait(*(path for path, _ in self._pending))
        finally:
            if self._thread is not None:
                self._thread.shutdown(wait=True)
                self._thread = None


def seal(content: bytes) -> bytes:
    """Returns a file's content with its SHA-256 in place of the `UNSEALED` after `SEAL`.

    Neither safetensors, ONNX, JSON nor checkpoints detect a number that changed on disk.
    """
    return _SEALED.sub(lambda found: found[0][:-64] + _digest(content).encode(), content, count=1)


def is_intact(content: bytes) -> bool | None:
    """Whether the content is unchanged since `seal`; None if it holds no checksum."""
    place = content.find(SEAL.encode())
    if place < 0:
        return None if content.find(_MARK.encode()) < 0 else False
    found = _SEALED.match(content, place)
    if found is None:
        return False
    start, end = found.span(1)
    view = memoryview(content)
    return _digest(view[:start], _OPEN.encode(), view[end:]) == found[1].decode()


def require_intact(path: Path, content: bytes) -> None:
    """Refuses content that changed since `seal` by a DamagedFileError; content without a checksum is accepted."""
    if is_intact(content) is False:
        raise DamagedFileError(f"{path}: damaged or changed, its SHA-256 is not the recorded one")


def file_sha256(path: str | Path) -> str:
    """Hashes a file's bytes to 64 hexadecimal digits; a missing file is a `UserError`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    # The rename has happened already; some file systems cannot sync a folder.
    with contextlib.suppress(OSError):
        _sync(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
