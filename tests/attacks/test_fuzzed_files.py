"""Every kind of file that a command reads, spoilt in every way: refused by name, made again, or as if untouched.

A part of it runs with all tests, the whole by `make attacks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
from damages import CHANGES, DAMAGES, EXECUTED, damage
from scenes import COMMANDS, RUNS, Called, Command, World, call

RUN, OTHER = RUNS


@dataclass(frozen=True)
class Kind:
    """A file: the scene that it is in, where it is, where one of its kind is that is another's, and who reads it."""

    scene: str
    path: str
    other: str
    commands: tuple[str, ...]


def _kinds() -> Iterator[Kind]:
    """Of every scene the files that are read; names may be patterns, of which the first that fits is meant."""
    for name, commands in {
        "status.json": ("report", "evaluate", "compare", "compare, the table"),
        "result.json": ("report", "export", "evaluate", "compare", "compare, the table"),
        "config.yaml": ("report", "export", "evaluate", "compare"),
        "provenance.json": ("report", "export", "evaluate"),
        "metrics.csv": ("report",),
        "arrays.npz": ("report", "evaluate"),
        "student.safetensors": ("export", "evaluate"),
        "checkpoints/best.ckpt": ("export best",),
        ".hydra/overrides.yaml": ("compare", "report"),
        ".hydra/hydra.yaml": ("report",),
        ".metrics.json": ("report",),
    }.items():
        yield Kind("study", f"{RUN}/{name}", f"{OTHER}/{name}", commands)
    yield Kind("study", f"{RUN}/export/export.json", f"{RUN}/result.json", ("export again",))
    yield Kind("study", f"{RUN}/export/README.md", f"{RUN}/result.json", ("export again",))
    yield Kind("study", f"{RUN}/export/student.safetensors", f"{RUN}/student.safetensors", ("load", "export again"))
    yield Kind("study", "study/study.json", f"{RUN}/result.json", ("compare", "compare, the table"))
    for name in (
        *("status.json", "result.json", "config.yaml", "provenance.json", "metrics.csv", ".hydra/overrides.yaml"),
        *(".hydra/config.yaml", ".hydra/hydra.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt"),
    ):
        yield Kind("stopped", f"stopped/a/{name}", f"stopped/b/{name}", ("resume",))
    for name in (
        *("status.json", "config.yaml", "provenance.json", "metrics.csv", ".metrics.json", ".hydra/overrides.yaml"),
        *("checkpoints/last.ckpt", "checkpoints/best.ckpt"),
    ):
        yield Kind("sweep", f"sweep/0/{name}", f"sweep/1/{name}", ("resume the sweep",))
    for name in ("status.json", "result.json", "config.yaml", "provenance.json", ".hydra/overrides.yaml"):
        yield Kind("sweep", f"sweep/1/{name}", f"sweep/2/{name}", ("resume the sweep",))
    for name in ("sweep.json", "multirun.yaml"):
        yield Kind("sweep", f"sweep/{name}", "sweep/1/result.json", ("resume the sweep",))
    yield Kind("tuned", "tuned/kd_mean.yaml", "tuned/kd_mean/search.json", ("tuned rows", "print", "tune"))
    yield Kind("tuned", "tuned/kd_mean/search.json", "tuned/kd_mean.yaml", ("tune",))
    yield Kind("tuned", "tuned/kd_mean/trials.journal", "tuned/kd_mean/search.json", ("tune",))
    for pattern in ("teachers/*/teacher.safetensors", "teachers/*/key.json", "outputs/*.safetensors", "tables/*.rows"):
        yield Kind("store", f"store/{pattern}", f"store/{pattern}", ("train",))
    yield Kind("store", "store/tables/*.json", "store/tables/*.json", ("train",))
    yield Kind("store", "store/tables/*.lock", "store/tables/*.json", ("train",))
    yield Kind("store", "store/teachers/*.lock", "store/tables/*.json", ("train",))


KINDS = {kind.path: kind for kind in _kinds()}
_usual: dict[str, Any] = {}


def usual(world: World, name: str, scene: str) -> Any:
    """What a command leaves where nothing is damaged."""
    if name not in _usual:
        command = COMMANDS[name]
        for one in ("store", scene):
            world.restore(one)
        called = call(command.program, *command.words(world.root), cwd=world.root)
        assert called.code == 0, called.err
        _usual[name] = command.left(world.root, called)
    return _usual[name]


class WrongEndError(Exception):
    """None of the ends that a damaged file may have."""


def attack(world: World, kind: str, name: str, how: str, seed: int) -> str:
    """Spoils a file and calls a command that reads it.

    Returns:
        Which of the allowed ends that had.

    Raises:
        WrongEndError: If it had another one.
    """
    found, command = KINDS[kind], COMMANDS[name]
    expected = usual(world, name, found.scene)
    world.restore(found.scene)
    file, other = sorted(world.root.glob(found.path))[0], sorted(world.root.glob(found.other))[-1]
    damage(how, file, other, Random(f"{kind} {how} {seed}"))
    called = call(command.program, *command.words(world.root), cwd=world.root)
    if list(world.root.rglob(EXECUTED)):
        raise WrongEndError("something was executed")
    if called.error is not None or "Traceback" in called.err:
        raise WrongEndError(f"traceback\n{called.err[-1500:]}")
    try:
        return judge(command, called, file, world, expected)
    except WrongEndError as error:
        raise WrongEndError(f"{error}\n{called.err[-1500:]}") from None


def judge(command: Command, called: Called, file: Path, world: World, expected: Any) -> str:
    """Which of the allowed ends a command had that neither crashed nor ran what stands in the file."""
    named = file.name in called.complaints
    refused = called.code and not (command.leaves_out and called.code == 1)
    if refused:
        lines = [line for line in called.err.splitlines() if line.startswith(f"{command.program}: error: ")]
        if not named or (called.code == 2 and len(lines) != 1):  # of an evaluation each part says so
            raise WrongEndError(f"refused in {len(lines)} lines, {'with' if named else 'without'} its name")
        return "refused by name"
    left = command.left(world.root, called)
    if left == expected:
        return "the identical result"
    if not (command.leaves_out and (named or file.name in repr(left))):
        raise WrongEndError(f"another result: {_difference(left, expected)}")
    if command.others(left) != command.others(expected):
        raise WrongEndError("of other runs another result")
    return "left out by name"


def _difference(one: Any, other: Any, at: str = "") -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = one.keys() | other.keys()
        found = [_difference(one.get(key), other.get(key), f"{at}.{key}") for key in sorted(keys, key=str)]
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        found = [_difference(a, b, f"{at}[{place}]") for place, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        return "" if one == other else f"{at}: {one!r:.80} for {other!r:.80}"
    return "; ".join(filter(None, found))[:600]


def attack_all(
    world: World, outcomes: Counter[str], kind: str, command: str, damages: Sequence[str], seeds: Sequence[int] = (0,)
) -> None:
    wrong = []
    for how, seed in product(damages, seeds):
        try:
            outcomes[f"damaged file: {attack(world, kind, command, how, seed)}"] += 1
        except WrongEndError as error:
            wrong.append(f"-- {how} {seed}: {error}")
            print(f"{kind}, {command}, {wrong[-1]}", flush=True)  # at once, where pytest -s shows it
    assert not wrong, f"{kind}, {command}: {len(wrong)} of {len(damages) * len(seeds)}\n" + "\n".join(wrong)


@pytest.mark.parametrize("kind", [kind for kind, found in KINDS.items() if found.scene == "study"])
def test_some_damages(world, outcomes, kind):
    attack_all(world, outcomes, kind, KINDS[kind].commands[0], [Random(kind).choice(DAMAGES)])


@pytest.mark.attacks
@pytest.mark.parametrize(
    ("kind", "command"), [(kind, command) for kind, found in KINDS.items() for command in found.commands]
)
def test_every_damage(world, outcomes, kind, command):
    draw = Random(f"{kind} {command}")
    damages = draw.sample(DAMAGES, 16)
    if COMMANDS[command].trains:  # seconds, not tenths
        damages = [*draw.sample(sorted(CHANGES), 3), "zero", "gone", "of another"]
    attack_all(world, outcomes, kind, command, damages)
