"""Reads what loggers wrote: metrics.csv, and of W&B all that a later `wandb sync` would send."""

from __future__ import annotations

import csv
import struct
from pathlib import Path
from typing import Any

import yaml


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def offline_runs(directory: Path) -> list[Path]:
    return sorted((directory / "wandb").glob("offline-run-*"))


def records(folder: Path) -> dict[str, list]:
    """Everything an offline run would send, by kind; the file is a LevelDB log after a header of 7 bytes."""
    import wandb
    from wandb.proto import wandb_internal_pb2 as messages

    wandb.teardown()  # `wandb.finish` returns before the service has written the end of the file
    (file,) = folder.glob("*.wandb")
    data, position, found, parts = file.read_bytes(), 7, {}, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # no record begins at the very end of a block
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = messages.Record.FromString(parts)  # type: ignore[attr-defined]
            name, parts = record.WhichOneof("record_type"), b""
            found.setdefault(name, []).append(getattr(record, name))
    return found


def unpacked(*updates) -> dict[str, object]:
    """Values by key over several lists of items; what a key holds below itself is a mapping again."""
    found: dict = {}
    for item in (item for items in updates for item in items):
        *path, last = [item.key] if item.key else list(item.nested_key)
        place = found
        for name in path:
            place = place.setdefault(name, {})
        place[last] = yaml.safe_load(item.value_json)
    return found


def run_of(folder: Path):
    """What is told of a run at its start."""
    return records(folder)["run"][0]


def config_of(folder: Path) -> dict[str, object]:
    """The configuration of a run, as it was and as it was changed."""
    found = records(folder)
    return unpacked(*(one.config.update for one in found["run"]), *(one.update for one in found.get("config", [])))


def summary_of(folder: Path) -> dict[str, object]:
    """What the summary of a run came to, as far as we set it."""
    return unpacked(*(item.update for item in records(folder).get("summary", [])))


def history_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's history."""
    return [unpacked(row.item) for row in records(folder).get("history", [])]
