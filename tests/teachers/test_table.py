from __future__ import annotations

import dataclasses
import errno
import hashlib
import inspect
import json
import os
import signal
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_lightning.errors import UserError
from ekd_lightning.teachers import plan
from ekd_lightning.teachers import table as teacher_table
from ekd_lightning.teachers.plan import check_disk, table_bytes
from ekd_lightning.teachers.table import TableKey, TeacherTable, row_dtype

N, V, C, D = 40, 18, 5, 7
COLUMNS = (("logits", C), ("pooled", D))
KEY = TableKey("a" * 64, "b" * 64, N, "crop_flip-padding1-flip", V, COLUMNS)


def every_row(key: TableKey = KEY) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(key.num_rows)
    return rows // key.num_views, rows % key.num_views


def values(index: np.ndarray, view: np.ndarray, key: TableKey = KEY) -> dict[str, np.ndarray]:
    """Outputs that depend on the row, exact in float16."""
    rows = (index * key.num_views + view)[:, None]
    return {
        name: ((rows * 31 + np.arange(width)) % 997 / 8 - len(name)).astype(np.float32) for name, width in key.columns
    }


def zeros(rows: int) -> dict[str, np.ndarray]:
    return {name: np.zeros((rows, width), np.float32) for name, width in COLUMNS}


def filled(folder: Path, key: TableKey = KEY) -> TeacherTable:
    table = TeacherTable(folder, key)
    table.write(*every_row(key), values(*every_row(key), key))
    return table


def count(table: TeacherTable) -> int:
    """Rows that are present."""
    return int(table.read(*every_row(table.key))[1].sum())


def assert_right(table: TeacherTable) -> int:
    """Checks every present row; returns how many there are."""
    index, view = every_row(table.key)
    found, present = table.read(index, view)
    wanted = values(index, view, table.key)
    assert list(found) == list(wanted)
    for name, column in found.items():
        np.testing.assert_array_equal(column[present], wanted[name][present])
        assert np.isnan(column[~present]).all()
    return int(present.sum())


# --- the file


def test_round_trip_equals_float16_rounding(tmp_path):
    rng = np.random.default_rng(0)
    index, view = np.array([3, 0, 39, 3]), np.array([17, 0, 17, 2])
    logits = rng.normal(0, 30, (4, C)).astype(np.float32)
    pooled = rng.normal(0, 1e-6, (4, D)).astype(np.float32)
    table = TeacherTable(tmp_path, KEY)
    table.write(index, view, {"logits": logits, "pooled": pooled})
    for reader in (table, TeacherTable(tmp_path, KEY)):
        found, present = reader.read(index, view)
        assert present.all()
        assert found["logits"].dtype == found["pooled"].dtype == np.float16
        np.testing.assert_array_equal(found["logits"], logits.astype(np.float16))
        np.testing.assert_array_equal(found["pooled"], pooled.astype(np.float16))
    assert count(table) == 4


def test_holes_are_absent_and_zero_outputs_present(tmp_path):
    table, rows = TeacherTable(tmp_path, KEY), every_row()
    assert (count(table), table.disk_bytes()) == (0, 0)
    table.write(*rows, zeros(len(rows[0])))
    found, present = table.read(*rows)
    assert present.all()
    assert not any(column.any() for column in found.values())


def test_the_check_value_of_a_written_row_is_never_that_of_a_hole():
    # Row numbers whose mixed-in value cancels the CRC would otherwise look like holes.
    payload = np.zeros((1, 2), np.uint8)
    factor = 0x9E3779B1
    row = zlib.crc32(payload.tobytes()) * pow(factor, -1, 1 << 32) % (1 << 32)
    assert teacher_table._check_values(payload, np.array([row]), 0)[0] == 1


@given(st.integers(1, 200), st.integers(0, 5), st.integers(0, 2**31))
def test_check_values_of_many_rows_at_once_are_those_of_zlib(length, count, seed):
    payloads = np.random.default_rng(seed).integers(0, 256, (count, length), dtype=np.uint8)
    assert teacher_table._crc32(payloads).tolist() == [zlib.crc32(row.tobytes()) for row in payloads]


@given(rows=st.lists(st.integers(0, 2**40), unique=True, min_size=2, max_size=20))
def test_no_two_rows_accept_each_others_payload(rows):
    low = np.unique(np.array(rows) % 2**32)
    checks = teacher_table._check_values(np.zeros((len(low), 2 * C), np.uint8), low, 0)
    assert len(np.unique(checks)) == len(low)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, N * V - 1), max_size=30), max_size=4), with_pooled=st.booleans())
def test_exactly_the_written_rows_are_present(tmp_path_factory, rows, with_pooled):
    key = TableKey("a" * 64, "b" * 64, N, "v", V, COLUMNS if with_pooled else COLUMNS[:1])
    table = TeacherTable(tmp_path_factory.mktemp("table"), key)
    for some in rows:
        index, view = np.array(some, np.int64) // V, np.array(some, np.int64) % V
        table.write(index, view, values(index, view, key))
    index, view = every_row(key)
    found, present = table.read(index, view)
    known = sorted({row for some in rows for row in some})
    assert np.flatnonzero(present).tolist() == known
    np.testing.assert_array_equal(found["logits"][present], values(index, view, key)["logits"][present])
    assert ("pooled" in found) == with_pooled


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="needs Linux's list of mappings")
def test_nothing_is_read_ahead(tmp_path):
    """Of a large table the system would fetch megabytes of holes around every row, and drop what is needed for them."""
    table = filled(tmp_path)
    table.read(*every_row())  # which drops mapped pages, and must not drop the advice
    mappings = Path("/proc/self/smaps").read_text().split(str(table.path))[1:]
    flags = [line.split() for one in mappings for line in one.splitlines() if line.startswith("VmFlags")]
    assert len(mappings) == 1
    assert "rr" in flags[0]  # "random read advise provided", proc(5)


@pytest.mark.parametrize(("index", "view"), [(-1, 0), (N, 0), (0, -1), (0, V)])
def test_rows_outside_the_table_are_refused(tmp_path, index, view):
    table = TeacherTable(tmp_path, KEY)
    at = np.array([index]), np.array([view])
    with pytest.raises(IndexError, match="must lie in"):
        table.read(*at)
    with pytest.raises(IndexError, match="must lie in"):
        table.write(*at, zeros(1))


def test_pooled_features_must_match_the_content(tmp_path):
    index, view = np.arange(3), np.arange(3)
    with pytest.raises(ValueError, match="pooled"):
        TeacherTable(tmp_path, KEY).write(index, view, {"logits": values(index, view)["logits"]})


@pytest.mark.parametrize(
    "other",
    [
        {"teacher_sha256": "c" * 64},
        {"image_set_sha256": "c" * 64},
        {"view_key": "crop_flip-padding1-noflip"},
        {"num_views": V + 1},
        {"num_images": N + 1},
        {"columns": COLUMNS[:1]},
        {"columns": (("stage2", C + D),)},
        {"numeric_format": "bfloat16"},
    ],
)
def test_rows_of_another_key_are_never_read(tmp_path, other):
    table = filled(tmp_path)
    stranger = TeacherTable(tmp_path, TableKey(**{**vars(KEY), **other}))
    assert stranger.path != table.path
    assert not stranger.read(np.arange(N), np.zeros(N, np.int64))[1].any()


@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS[:1]])
def test_names_of_tables_of_logits_are_those_of_the_first_layout(columns):
    """Tables that are there are found again."""
    facts = {
        "layout": 1,
        "content": "logits+pooled" if len(columns) == 2 else "logits",
        "stored": "float16",
        "teacher_sha256": "a" * 64,
        "image_set_sha256": "b" * 64,
        "num_images": N,
        "view_key": KEY.view_key,
        "num_views": V,
        "num_classes": C,
        "pooled_dim": D if len(columns) == 2 else 0,
        "numeric_format": "float32",
    }
    expected = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    assert dataclasses.replace(KEY, columns=columns).name == expected


def test_a_row_at_a_wrong_place_is_absent(tmp_path):
    table = filled(tmp_path)
    data, size = bytearray(table.path.read_bytes()), row_dtype(COLUMNS).itemsize
    data[5 * size : 6 * size] = data[9 * size : 10 * size]
    table.path.write_bytes(data)
    with pytest.warns(RuntimeWarning, match=table.path.name):
        assert assert_right(TeacherTable(tmp_path, KEY)) == KEY.num_rows - 1


@settings(max_examples=30, deadline=None)
@given(place=st.integers(0, N * V * row_dtype(COLUMNS).itemsize - 1), bit=st.integers(0, 7))
def test_an_altered_byte_costs_one_row_and_is_repaired(tmp_path_factory, place, bit):
    folder = tmp_path_factory.mktemp("table")
    table = filled(folder)
    with table.path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))
    with pytest.warns(RuntimeWarning, match=table.path.name):
        assert assert_right(table) == KEY.num_rows - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.write(*every_row(), values(*every_row()))
        assert assert_right(table) == KEY.num_rows


@pytest.mark.parametrize("part", [1, 10, row_dtype(COLUMNS).itemsize - 1])
def test_a_torn_row_is_absent(tmp_path, part):
    table, size = filled(tmp_path), row_dtype(COLUMNS).itemsize
    row = table.path.read_bytes()[100 * size : 101 * size]
    with table.path.open("r+b") as file:
        file.seek(100 * size)
        file.write(row[:part] + bytes(size - part))
    with pytest.warns(RuntimeWarning, match="half-written"):
        assert assert_right(table) == KEY.num_rows - 1


def change_sidecar(path: Path, change: Callable[[bytes], bytes]) -> None:
    sidecar = path.with_suffix(".json")
    sidecar.write_bytes(change(sidecar.read_bytes()))


DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "empty": lambda path: os.truncate(path, 0),
    "described otherwise": lambda path: change_sidecar(path, lambda text: text.replace(b"a" * 64, b"c" * 64)),
    "a list": lambda path: change_sidecar(path, lambda text: b"[]"),
    "no text": lambda path: change_sidecar(path, lambda text: b"\xff{"),
    "not described": lambda path: path.with_suffix(".json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_named_and_built_anew(tmp_path, damage):
    path = filled(tmp_path).path
    DAMAGES[damage](path)
    with pytest.warns(RuntimeWarning, match=path.name):
        again = TeacherTable(tmp_path, KEY)
    assert assert_right(again) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert assert_right(filled(tmp_path)) == KEY.num_rows
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".lock", ".rows"]


def test_a_builder_killed_half_way_leaves_nothing_to_trust(tmp_path):
    table = filled(tmp_path)
    os.replace(table.path, table.path.with_name(table.path.name + ".tmp"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert assert_right(TeacherTable(tmp_path, KEY)) == 0


def test_a_file_cut_short_while_open_is_an_error_not_a_crash(tmp_path):
    table = filled(tmp_path)
    os.truncate(table.path, 0)
    with pytest.raises(OSError, match="cut short"):
        assert_right(table)


def test_a_read_only_cache_is_read(tmp_path, monkeypatch):
    filled(tmp_path)
    genuine = os.open

    def read_only(path, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "read-only file system", str(path))
        return genuine(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    table = TeacherTable(tmp_path, KEY)
    assert assert_right(table) == KEY.num_rows
    with pytest.raises(OSError, match="descriptor"):
        table.write(*every_row(), values(*every_row()))


# --- several processes

FILLER = """
import sys, numpy as np
from ekd_lightning.teachers.table import TableKey, TeacherTable
folder, seed, forever = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "forever"
key = TableKey("a" * 64, "b" * 64, {images}, "v", {views}, (("logits", {classes}), ("pooled", {features})))
table, rng = TeacherTable(folder, key), np.random.default_rng(seed)
{source}
print("ready", flush=True)
sys.stdin.readline()
again = True
while again:
    for rows in np.array_split(rng.permutation(key.num_rows), 40):
        index, view = rows // key.num_views, rows % key.num_views
        found, present = table.read(index, view)
        wanted = values(index, view, key)
        assert all((found[name][present] == wanted[name][present]).all() for name in wanted)
        table.write(index, view, wanted)
    again = forever
"""
# Wide rows cross page boundaries often.
WIDE = TableKey("a" * 64, "b" * 64, 150, "v", V, (("logits", 10), ("pooled", 301)))


def start_filler(folder: Path, seed: int, forever: bool = False) -> subprocess.Popen[str]:
    source = "KEY = key\n" + inspect.getsource(values)
    script = FILLER.format(images=150, views=V, classes=10, features=301, source=source)
    arguments = [sys.executable, "-W", "ignore", "-c", script, str(folder), str(seed), "forever" * forever]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_processes_fill_at_once(tmp_path):
    fillers = [start_filler(tmp_path, seed) for seed in (1, 2)]
    for filler in fillers:
        assert filler.stdout.readline() == "ready\n"
    for filler in fillers:
        filler.stdin.write("go\n")
        filler.stdin.flush()
    for filler in fillers:
        filler.communicate(timeout=60)
        assert filler.returncode == 0
    assert assert_right(TeacherTable(tmp_path, WIDE)) == WIDE.num_rows


@pytest.mark.filterwarnings("ignore:teacher table")
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_rows_are_right_after_a_kill_while_filling(tmp_path, share):
    table = TeacherTable(tmp_path, WIDE)
    with start_filler(tmp_path, 3, forever=True) as filler:
        assert filler.stdout.readline() == "ready\n"
        filler.stdin.write("go\n")
        filler.stdin.flush()
        while count(table) <= share * WIDE.num_rows:
            assert filler.poll() is None
        filler.send_signal(signal.SIGKILL)
        assert filler.wait(timeout=60) == -signal.SIGKILL
    assert assert_right(TeacherTable(tmp_path, WIDE)) > 0
    assert assert_right(filled(tmp_path, WIDE)) == WIDE.num_rows


def test_a_partly_written_row_is_an_error(tmp_path, monkeypatch):
    table = TeacherTable(tmp_path, KEY)
    monkeypatch.setattr(os, "pwrite", lambda *_: 3)
    with pytest.raises(OSError, match="only part of a row"):
        table.write(*every_row(), values(*every_row()))


# --- the disk budget


def test_table_bytes_bounds_what_a_full_table_takes(tmp_path):
    table = filled(tmp_path)
    os.fsync(table._fd)
    assert table.disk_bytes() <= table_bytes(N, V, COLUMNS)
    tight = table_bytes(50_000, 162, (("logits", 10),), set_size=50_000)
    assert 50_000 * 162 * 24 <= tight <= 50_000 * 162 * 24 + 4096


def test_check_disk(tmp_path, monkeypatch):
    folder = tmp_path / "not" / "there" / "yet"
    check_disk(folder, 10_000, 10_000, 0)
    with pytest.raises(UserError, match=r"12\.3 MB.*10\.0 MB"):
        check_disk(folder, 12_300_000, 10_000_000, 0)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    with pytest.raises(UserError, match=r"12\.3 MB.*5\.0 MB are free"):
        check_disk(folder, 12_300_000, 10**9, 0)
    check_disk(folder, 12_300_000, 10**9, 8_000_000)
    assert not folder.exists()


def resident_kb(path: Path) -> int:
    """Memory that this process holds of a mapped file."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc")
def test_reading_leaves_no_pages_of_the_file_in_the_process(tmp_path):
    table = filled(tmp_path)
    assert int(table._map.sum()) > 0  # touches every page
    assert resident_kb(table.path) > 0
    table.read(*every_row())
    assert resident_kb(table.path) == 0
