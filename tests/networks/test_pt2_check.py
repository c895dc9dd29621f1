"""An archive that would run code on being opened is refused before PyTorch opens it."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ekd_lightning.errors import UserError
from ekd_lightning.networks import load_deployed
from ekd_lightning.networks.deployed_load import check_archive

PATH = Path("some.pt2")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.fixture(scope="module")
def good() -> bytes:
    """A convolution with a dynamic batch, as PyTorch writes it."""
    program = torch.export.export(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()),
        (torch.zeros(2, 3, 8, 8),),
        dynamic_shapes={"input": {0: torch.export.Dim("batch")}},
    )
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"ekd_metadata.json": "{}"})
    return file.getvalue()


def changed(
    archive: bytes, change: Callable[[str, bytes], bytes | None], more: dict[str, bytes] | None = None
) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
        for name, data in (more or {}).items():
            new.writestr(name, data)
    return file.getvalue()


def program(change: Callable[[dict[str, Any]], None]) -> Callable[[str, bytes], bytes]:
    def apply(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        content = json.loads(data)
        change(content)
        return json.dumps(content).encode()

    return apply


def first_node(content: dict[str, Any]) -> dict[str, Any]:
    return content["graph_module"]["graph"]["nodes"][0]


def test_what_pytorch_writes_passes(good):
    check_archive(good, PATH)
    check_archive(changed(good, lambda name, data: data), PATH)


@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_inputs_that_would_run_code(good, tmp_path, way):
    target = tmp_path / "executed"
    file = io.BytesIO()
    if way == "torch":
        torch.save(((Malicious(target),), {}), file)
    else:
        pickle.dump(Malicious(target), file)
    evil = changed(good, lambda name, data: file.getvalue() if "sample_inputs" in name else data)
    path = tmp_path / "evil.pt2"
    path.write_bytes(evil)
    with pytest.raises(UserError, match="holds more than tensors"):
        load_deployed(path)
    assert not target.exists()


@pytest.mark.parametrize(
    "member", ["data/constants/opaque_obj_0", "data/constants/custom_obj_0", "data/aotinductor/a.so"]
)
def test_members_that_may_hold_code(good, member):
    evil = changed(good, lambda name, data: data, {f"archive/{member}": b"x"})
    with pytest.raises(UserError, match="may hold code"):
        check_archive(evil, PATH)


def _guard(content: dict[str, Any]) -> None:
    content["guards_code"] = ["__import__('os').system('true')"]


def _target(target: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: first_node(content).update(target=target)


def _size(text: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        values = content["graph_module"]["graph"]["tensor_values"]
        next(iter(values.values()))["sizes"][0] = {"as_expr": {"expr_str": text, "hint": None}}

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_guard, "guards are code"),
        (_target("os.system"), "it calls 'os.system'"),
        (_target("torch.ops.aten.from_file.default"), "it calls 'torch.ops.aten.from_file"),
        (_target("torch.ops.aten.conv2d.default.__globals__"), "it calls"),
        (_size("__import__('os').system('true')"), "it has the size"),
        (_size("exec(chr(112))"), "it has the size"),
        (_size("Symbol('x y')"), "it has the size"),
        (_size("Symbol.mro"), "it has the size"),
    ],
)
def test_descriptions_that_would_be_evaluated(good, change, said):
    with pytest.raises(UserError, match=said):
        check_archive(changed(good, program(change)), PATH)


def test_pickled_weights(good):
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("weights_config.json"):
            return data
        return data.replace(b'"use_pickle": false', b'"use_pickle": true').replace(
            b'"use_pickle":false', b'"use_pickle":true'
        )

    with pytest.raises(UserError, match="weights are pickled"):
        check_archive(changed(good, change), PATH)


def test_archives_that_are_none(good):
    twice = io.BytesIO(good)
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/byteorder", b"big")
    no_program = changed(good, lambda name, data: None if "models/" in name else data)
    for content in (b"", b"PK", twice.getvalue(), no_program):
        with pytest.raises(UserError, match=r"not a torch\.export archive, or damaged"):
            check_archive(content, PATH)
