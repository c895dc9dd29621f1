"""Commands killed at any instant and started again: the end is that of one that nobody killed, bit for bit."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from kills import acts_of
from scenes import COMMANDS, Called, World, call, compared, few, trained, tuned

pytestmark = pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="kills a forked process")


@dataclass(frozen=True)
class Work:
    """A command that is killed, what goes on with it, and what both leave in a folder.

    Attributes:
        scenes: Parts of the world that it needs, beside the store.
        start: Program and words.
        again: The same, for what continues.
        left: What there is in the end.
        cold: Whether the store is empty before, so that teachers are trained and tables filled.
    """

    start: Callable[[Path], tuple[object, ...]]
    again: Callable[[Path], tuple[object, ...]]
    left: Callable[[Path, Called], Any]
    scenes: tuple[str, ...] = ()
    cold: bool = False


def _train(w: Path) -> tuple[object, ...]:
    return ("ekd-train", *few(w), "method=kd_mean", f"hydra.run.dir={w}/out")


def _resume_or_train(w: Path) -> tuple[object, ...]:
    """What a person does: goes on where there is something to go on with."""
    if (w / "out" / "config.yaml").exists():
        return ("ekd-train", f"resume={w}/out")
    return _train(w)


def _sweep(w: Path) -> tuple[object, ...]:
    return ("ekd-train", "-m", *few(w), "method=branched_ce", "seed=0,1", f"hydra.sweep.dir={w}/out")


def _resume_or_sweep(w: Path) -> tuple[object, ...]:
    return ("ekd-train", f"resume={w}/out") if (w / "out" / "sweep.json").exists() else _sweep(w)


def _compare(w: Path) -> tuple[object, ...]:
    rows = ("--methods", "ce,kd_mean", "--no-controls", "--match", "none", "--fractions", 0.1, "--seeds", 0)
    own = [word for word in few(w) if not word.startswith("data.fraction")]
    return ("ekd-compare", "--output", w / "out", *rows, *own)


def _tune(w: Path) -> tuple[object, ...]:
    return ("ekd-tune", "--output", w / "out", "--trials", 3, *few(w), "recipe.epochs=1", "method=kd_mean")


def _of(name: str) -> tuple[Callable[[Path], tuple[object, ...]], Callable[[Path, Called], Any]]:
    command = COMMANDS[name]
    return lambda w: (command.program, *command.words(w)), command.left


train_left = COMMANDS["train"].left
evaluate, evaluated = _of("evaluate")
export, exported = _of("export")
WORKS: dict[str, Work] = {
    "training": Work(_train, _resume_or_train, train_left),
    "training with a cold store": Work(_train, _resume_or_train, train_left, cold=True),
    "teaching": Work(
        lambda w: ("ekd-teach", *few(w), "teachers.fill=all", f"hydra.run.dir={w}/out"), _train, train_left, cold=True
    ),
    "resuming": Work(
        lambda w: ("ekd-train", f"resume={w}/stopped/a"),
        lambda w: ("ekd-train", f"resume={w}/stopped/a"),
        COMMANDS["resume"].left,
        ("stopped",),
    ),
    "replacing": Work(
        lambda w: ("ekd-train", *few(w), "method=kd_mean", f"hydra.run.dir={w}/stopped/b", "overwrite=true"),
        lambda w: ("ekd-train", *few(w), "method=kd_mean", f"hydra.run.dir={w}/stopped/b", "overwrite=true"),
        lambda w, called: trained(w / "stopped" / "b"),
        ("stopped",),
    ),
    "sweeping": Work(_sweep, _resume_or_sweep, lambda w, called: [trained(w / "out" / name) for name in ("0", "1")]),
    "comparing": Work(_compare, _compare, lambda w, called: compared(w / "out")),
    "tuning": Work(_tune, _tune, lambda w, called: tuned(w / "out")),
    "exporting": Work(export, lambda w: (*export(w), "--force"), exported, ("study",)),
    "evaluating": Work(evaluate, evaluate, evaluated, ("study",)),
}

KILLED_EACH = 4


def prepare(world: World, work: Work) -> None:
    for scene in ("store", *work.scenes):
        world.restore(scene)
    if work.cold:
        shutil.rmtree(world.root / "store")


def go_on(world: World, work: Work) -> Any:
    """What there is in the end, once the work was continued."""
    words = work.again(world.root)
    called = call(str(words[0]), *words[1:], cwd=world.root)
    assert not called.code or "there is nothing to continue" in called.err, called.err[-3000:]
    return work.left(world.root, called)


@pytest.fixture(scope="session")
def undisturbed(world: World) -> Callable[[str], tuple[Any, int]]:
    """Of each work its end where nobody kills it, and the number of its acts."""
    found: dict[str, tuple[Any, int]] = {}

    def ask(name: str) -> tuple[Any, int]:
        if name not in found:
            work = WORKS[name]
            prepare(world, work)
            words = work.start(world.root)
            acts = acts_of(str(words[0]), *words[1:], folder=world.root)
            found[name] = go_on(world, work), acts
        return found[name]

    return ask


def kill_and_go_on(
    world: World, outcomes: Counter[str], undisturbed: Callable[[str], tuple[Any, int]], name: str, kills: int
) -> None:
    work = WORKS[name]
    expected, acts = undisturbed(name)
    wrong = []
    for at in sorted(Random(name).sample(range(1, acts + 1), min(kills, acts))):
        prepare(world, work)
        words = work.start(world.root)
        if acts_of(str(words[0]), *words[1:], folder=world.root, at=at):
            continue  # it was quicker this time
        try:
            assert go_on(world, work) == expected, "another end"
            outcomes[f"killed while {name}: the same end"] += 1
        except Exception as error:
            wrong.append(f"-- at act {at} of {acts}: {type(error).__name__}: {error}")
    assert not wrong, f"{name}: {len(wrong)} of {kills}\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", ["training", "exporting"])
def test_some_kills(world, outcomes, undisturbed, name):
    kill_and_go_on(world, outcomes, undisturbed, name, 1)


@pytest.mark.attacks
@pytest.mark.parametrize("name", WORKS)
def test_many_kills(world, outcomes, undisturbed, name):
    kill_and_go_on(world, outcomes, undisturbed, name, KILLED_EACH)
