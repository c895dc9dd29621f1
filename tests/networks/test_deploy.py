"""Deployed students: three formats, the same answers; archives that would run code are refused."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ekd_lightning import load, save
from ekd_lightning.errors import UserError
from ekd_lightning.networks import (
    BranchedStudent,
    DeployedModel,
    NetworkSpec,
    cut_branches,
    normalization,
    save_student,
)
from ekd_lightning.networks.deploy import SUFFIXES, DeployedStudent, quantize_onnx, to_bytes
from ekd_lightning.networks.deployed import check_archive, load_deployed

NAMES = [f"class {i}" for i in range(6)]
METADATA = {"class_names": NAMES, "image_size": 16, "data": {"name": "nothing", "fraction": 0.1}, "note": 'a "b" ü'}
ENSEMBLES = ("mean_logits", "mean_probs", "gate")
FILES = {
    # format: ensemble, branches, folded, with probabilities; each costs seconds of tracing
    "safetensors": [("gate", (2, 0), False, False), ("mean_probs", (1,), True, True)],
    "onnx": [("gate", (2, 0), True, True), ("mean_probs", (0, 1, 2), False, False)],
    "torch-export": [("gate", (2, 0), True, True), ("mean_logits", (0, 1, 2), False, False)],
}


def lived(ensemble: str = "mean_logits", split_after: str = "stage1") -> BranchedStudent:
    """A student whose batch norms, the gate's too, have statistics and scales of their own."""
    torch.manual_seed(3)
    spec = NetworkSpec("resnet8", len(NAMES), normalization("cifar10"), {"width": 0.25})
    student = BranchedStudent(spec, branches=3, split_after=split_after, ensemble=ensemble).eval()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return student


def images(batch: int) -> torch.Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good file of each format: the first of `FILES`."""
    made = tmp_path_factory.mktemp("deployed")
    for name, suffix in SUFFIXES.items():
        (made / f"good{suffix}").write_bytes(content(name, *FILES[name][0]))
    return made


def content(file_format: str, ensemble: str, branches: tuple[int, ...], fold: bool, probabilities: bool) -> bytes:
    student = cut_branches(lived(ensemble), branches)
    return to_bytes(DeployedStudent(student, fold=fold, probabilities=probabilities), METADATA, file_format)


def coupled(branch_logits: np.ndarray, weights: np.ndarray, ensemble: str, kept: tuple[int, ...]) -> np.ndarray:
    """The prediction of some branches, image by image, from the definitions."""
    rows = []
    for b in range(branch_logits.shape[1]):
        logits = [branch_logits[k, b].astype(float) for k in kept]
        if ensemble == "mean_probs":
            rows.append(np.log(np.mean([np.exp(z) / np.exp(z).sum() for z in logits], axis=0)))
        else:
            w = [1.0] * len(kept) if ensemble == "mean_logits" else [float(weights[b, k]) for k in kept]
            rows.append(sum(wk / sum(w) * z for wk, z in zip(w, logits, strict=True)))
    return np.array(rows)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_every_subset_folded_or_not_is_coupled_by_definition(ensemble, tmp_path):
    student = lived(ensemble)
    with torch.no_grad():
        output = student.outputs(images(7))
        gate = student.gate(output.stages[0]["stage1"]) if student.gate else torch.ones(7, 3)
    for kept, fold in product([(0,), (2,), (0, 2), (2, 1, 0)], [True, False]):
        expected = coupled(output.branch_logits.numpy(), gate.numpy(), ensemble, kept)
        path = tmp_path / "student.safetensors"
        path.write_bytes(content("safetensors", ensemble, kept, fold, False))
        assert_same(load(path)(images(7)), torch.from_numpy(expected).float())


@pytest.mark.parametrize("suffix", SUFFIXES.values())
def test_a_student_of_any_loop_is_saved_and_loaded(suffix, tmp_path):
    student = lived("mean_logits").train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    names = [f"class {c}" for c in range(student.num_classes)]
    save(student, tmp_path / f"mine{suffix}", names, 16)
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    model = load(tmp_path / f"mine{suffix}")
    assert (model.class_names, model.image_size) == (tuple(names), 16)
    assert_same(model(images(5)), student.eval()(images(5)).detach())


def test_what_cannot_be_saved_is_told(tmp_path):
    student = lived("mean_logits")
    names = ["a"] * student.num_classes
    for given, path, classes, size, message in (
        (student, "a.pt", names, 16, r"a.pt: .* must end in .safetensors, .onnx, .pt2"),
        (student, "a.onnx", names[1:], 16, rf"must be {len(names)} names"),
        (torch.nn.Linear(3, 2), "a.onnx", names, 16, "student must be a BranchedStudent, not a Linear"),
        (student, "a.safetensors", names, "16", "image_size='16': must be a number of pixels"),
        (student, "a.safetensors", names, (16, 0), r"image_size=\(16, 0\): must be"),
    ):
        with pytest.raises(UserError, match=message):
            save(given, tmp_path / path, classes, size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file_format", SUFFIXES)
def test_each_format_says_what_the_student_says_at_any_batch_size(file_format, folder, tmp_path):
    for position, (ensemble, branches, fold, probabilities) in enumerate(FILES[file_format]):
        path = folder / f"good{SUFFIXES[file_format]}"
        if position:
            path = tmp_path / f"student{SUFFIXES[file_format]}"
            path.write_bytes(content(file_format, ensemble, branches, fold, probabilities))
        model, student = load_deployed(path), cut_branches(lived(ensemble), branches)
        for batch in (1, 7, 64):
            with torch.no_grad():
                expected = student(images(batch))
            assert_same(model(images(batch)), expected)
            assert_same(model.probabilities(images(batch)), expected.softmax(-1))
        assert model.format == file_format
        assert {key: model.metadata[key] for key in METADATA} == METADATA
        rest = {"branches": len(branches), "ensemble": student.ensemble, "split_after": "stage1"}
        outputs = {"folded": fold, "probabilities": probabilities}
        assert model.metadata["spec"] == {"network": student.spec.to_dict(), **rest, **outputs}


@pytest.mark.parametrize("split_after", ["none", "stem", "stage3"])
def test_wherever_branches_begin(split_after, tmp_path):
    student = lived(split_after=split_after)
    path = tmp_path / "student.safetensors"
    path.write_bytes(to_bytes(DeployedStudent(student), METADATA, "safetensors"))
    with torch.no_grad():
        assert_same(load(path)(images(5)), student(images(5)))


def test_second_output_of_the_runtimes_themselves(folder):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(folder / "good.onnx"))
    logits, probabilities = map(torch.from_numpy, session.run(None, {"images": images(3).numpy()}))
    assert_same(probabilities, logits.softmax(-1))
    assert session.get_inputs()[0].shape == ["batch", 3, 16, 16]
    first, second = torch.export.load(folder / "good.pt2").module()(images(3))
    assert_same(first, logits)
    assert_same(second, probabilities)


def test_a_folded_student_has_no_batch_norm_and_no_gradient():
    folded, plain = DeployedStudent(lived("gate")), DeployedStudent(lived("gate"), fold=False)
    norms = nn.BatchNorm1d | nn.BatchNorm2d
    assert not any(isinstance(module, norms) for module in folded.modules())
    assert any(isinstance(module, norms) for module in plain.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_the_student_and_the_random_generator_stay_as_they_were(folder):
    student = lived("gate")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state = torch.get_rng_state()
    DeployedStudent(student)
    load_deployed(folder / "good.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    after = student.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_files_name_no_place_of_the_machine_that_made_them(folder):
    package = str(Path(sys.modules["ekd_lightning"].__file__).parent).encode()
    for suffix in SUFFIXES.values():
        found = (folder / f"good{suffix}").read_bytes()
        assert package not in found
        assert b"frozen.py" not in found


def test_loading_imports_neither_lightning_nor_hydra_nor_wandb(folder):
    code = (
        "import sys, torch, ekd_lightning\n"
        "for path in sys.argv[1:]:\n"
        "    print(ekd_lightning.load(path)(torch.rand(2, 3, 16, 16)).shape)\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    files = [str(folder / f"good{suffix}") for suffix in SUFFIXES.values()]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    *shapes, modules = done.stdout.splitlines()
    assert shapes == ["torch.Size([2, 6])"] * 3
    for name in ("pytorch_lightning", "lightning", "hydra", "omegaconf", "wandb", "onnxscript"):
        assert f"'{name}'" not in modules


def test_what_a_model_accepts(folder):
    model = load(folder / "good.safetensors")
    assert isinstance(model, DeployedModel)
    assert model.class_names == tuple(NAMES)
    assert "2 branches, 6 classes" in repr(model)
    with pytest.raises(TypeError, match=r"must be a tensor .*, got list; ekd_lightning.read_images"):
        model.classify(["crow.jpg"])
    with pytest.raises(TypeError, match="divide by 255"):
        model(torch.zeros(1, 3, 16, 16, dtype=torch.int64))
    for strange in (images(4) * 255, (images(4) - 0.5) / 0.2, images(4) * float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            model.classify(strange)
    pixels = (images(4) * 255).round().to(torch.uint8)
    assert_same(model(pixels), model(pixels / 255))
    assert model.classify(images(4) + 0.1)
    assert len(model(images(0))) == 0
    for shape in ((3, 16, 16), (1, 1, 16, 16), (1, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"\[B, 3, 16, 16\]"):
            model(torch.zeros(shape))
    expected = model(images(4)).softmax(-1)
    for (name, share), row in zip(model.classify(images(4)), expected, strict=True):
        assert name == NAMES[int(row.argmax())]
        assert share == pytest.approx(float(row.max()))
    assert_same(model(images(4).double()), model(images(4)))


# -- files that are not what they should be ---------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES.values())
def test_damage_is_one_line_that_names_the_file(suffix, folder, tmp_path):
    good = (folder / f"good{suffix}").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    wrong = {"half": good[: len(good) // 2], "flipped": bytes(flipped), "empty": b"", "text": b"hello " * 40}
    for name, data in wrong.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_files_of_other_kinds(folder, tmp_path):
    save_student(tmp_path / "student.safetensors", lived())
    with pytest.raises(UserError, match=r"holds a student, not a deployed student \(ekd-export"):
        load(tmp_path / "student.safetensors")
    with pytest.raises(UserError, match=r"cannot be read"):
        load(tmp_path / "none.onnx")
    with pytest.raises(UserError, match=r"not an exported student, whose file ends in .safetensors, .onnx, .pt2"):
        load(tmp_path / "model.pth")
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "other.pt2")
    with pytest.raises(UserError, match="holds something else"):
        load(tmp_path / "other.pt2")


def test_a_missing_runtime_names_the_extra(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnxruntime is not installed: pip install 'ekd-lightning\[export\]'"):
        load(folder / "good.onnx")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_a_device_that_is_not_there(folder):
    with pytest.raises(UserError, match="device cuda"):
        load(folder / "good.safetensors", device="cuda")


def test_a_device_of_no_kind_is_named(folder):
    with pytest.raises(UserError, match="device 'gpu' is none of PyTorch's; give cpu or cuda"):
        load(folder / "good.safetensors", device="gpu")


# -- int8 -------------------------------------------------------------------------------------------------


def test_int8_per_channel_but_for_the_first_convolution_and_the_heads(folder, tmp_path):
    onnx = pytest.importorskip("onnx")
    student = cut_branches(lived("gate"), (2, 0))
    given = (folder / "good.onnx").read_bytes()
    strings = _props(onnx, given)
    path = tmp_path / "int8.onnx"
    path.write_bytes(quantize_onnx(given, (images(16).numpy() for _ in range(2)), strings))
    model = load(path)
    assert model.metadata["class_names"] == NAMES
    with torch.no_grad():
        expected = student(images(64))
    error = (model(images(64)) - expected).abs()
    assert 0 < float(error.mean()) < 0.1 * float(expected.std())
    graph = onnx.load(str(path)).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    eights = [
        tensor for tensor in weights.values() if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4
    ]
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(eights) == len(convolutions) - 1
    for tensor in eights:
        values = onnx.numpy_helper.to_array(tensor)
        assert abs(values).max() <= 64  # 7 bits, without saturation where there is no VNNI
        scale = weights[tensor.name.removesuffix("_quantized") + "_scale"]
        assert list(scale.dims) == [tensor.dims[0]]
    assert len(path.read_bytes()) < len(given)


def _props(onnx, model: bytes) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load_from_string(model).metadata_props}


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
