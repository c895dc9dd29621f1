"""Every kind of file that a command reads, spoilt in every way: refused by name, made again, or as if untouched.

A part of it runs with all tests, the whole by `make attacks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
from damages import DAMAGES, EXECUTED, damage
from scenes import COMMANDS, RUNS, Called, Command, World, call, make_world

KINDS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    name: ("study", f"{RUNS[0]}/{name}", f"{RUNS[1]}/{name}", commands)
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
    }.items()
}
"""File -> its scene, its path in the world, that of another run, and the commands that read it."""

OUTCOMES: Counter[str] = Counter()
_usual: dict[str, Any] = {}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("attacks"))


def usual(world: World, name: str) -> Any:
    """What a command leaves where nothing is damaged."""
    if name not in _usual:
        command = COMMANDS[name]
        for scene in ("study", "stopped", "sweep", "tuned", "store"):
            world.restore(scene)
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
    scene, path, other, _ = KINDS[kind]
    command, expected = COMMANDS[name], usual(world, name)
    world.restore(scene)
    file = world.root / path
    damage(how, file, world.root / other, Random(f"{kind} {how} {seed}"))
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
    named = file.name in called.err
    refused = called.code and not (command.leaves_out and called.code == 1)
    if refused:
        lines = [line for line in called.err.splitlines() if line.startswith(f"{command.program}: error: ")]
        if not named or len(lines) != 1:
            raise WrongEndError(f"refused in {len(lines)} lines" + "" if named else ", without its name")
        return "refused by name"
    left = command.left(world.root, called)
    if left == expected:
        return "the identical result"
    if not (command.leaves_out and named):
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


def attack_all(world: World, kind: str, command: str, damages: Sequence[str], seeds: Sequence[int] = (0,)) -> None:
    wrong = []
    for how, seed in product(damages, seeds):
        try:
            OUTCOMES[attack(world, kind, command, how, seed)] += 1
        except WrongEndError as error:
            wrong.append(f"-- {how} {seed}: {error}")
    assert not wrong, f"{kind}, {command}: {len(wrong)} of {len(damages) * len(seeds)}\n" + "\n".join(wrong)


@pytest.mark.attacks
@pytest.mark.parametrize(
    ("kind", "command"), [(kind, command) for kind, (*_, commands) in KINDS.items() for command in commands]
)
def test_every_damage(world, kind, command):
    attack_all(world, kind, command, DAMAGES)
