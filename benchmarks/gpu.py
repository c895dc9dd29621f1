"""All GPU figures of the docs in one run of a few minutes: docs/results/speed_gpu.{json,md}.

    python benchmarks/gpu.py --output speed_gpu.json              where there are CUDA, CIFAR-10 and three teachers
    python benchmarks/gpu.py --page docs/results speed_gpu.json   the page of what was measured; later files fill gaps
    python benchmarks/gpu.py --tiny --output try.json             the same code on a processor, on the bundled digits

Every part is a process of its own, so that one that fails or hangs costs its own figures only; what it had found by
then counts. Parts of a group start together (images, teachers, compiling) and are measured one after another.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu_page
import gpu_shared
import torch

from ekd_lightning.bench import rate_of, seconds_of
from ekd_lightning.bench.cost import time_shares
from ekd_lightning.bench.ours import BareLoop, Clock
from ekd_lightning.bench.parts import Bench, fastest_plain, worker_counts
from ekd_lightning.bench.plain import CarefulLoop, PlainLoop
from ekd_lightning.cli.train import quiet_libraries
from ekd_lightning.config.config import compose_settings
from ekd_lightning.files import read_json, write_json
from ekd_lightning.pipeline.prepare import prepare
from ekd_lightning.runs.writer import provenance
from ekd_lightning.teachers.hardware import resolve_precision
from ekd_lightning.teachers.source import FrozenTeachers, TeacherFormat
from ekd_lightning.training.pool import gather_teachers

WORK = ("experiment=cifar10_limited", "method=ekd_pooled", "data.fraction=0.5", "recipe.epochs=3")
PLANNED_EPOCHS = 60
"""Epochs for which our own trainings are planned, so that they hold all teacher rows on the device; they end sooner."""
TINY = (
    "method=ekd_pooled",
    "data.fraction=0.1",
    "data.eval_batch_size=120",
    "recipe.epochs=2",
    "recipe.batch_size=32",
    "+student.options={width: 0.5}",
    "teachers.pool=[{train: resnet8, options: {width: 0.5}, seed: 0}, {train: resnet8, seed: 1}]",
    "teachers.recipe.epochs=1",
    "teachers.recipe.batch_size=32",
    "trainer=cpu",
    "trainer.precision=32-true",
    "teachers.compile=never",
)
FORMS = {
    "eager": ("student.compile=never", "capture=never"),
    "captured": ("student.compile=never", "capture=auto"),
    "captured and compiled": ("student.compile=always", "capture=auto"),
}
"""Of our own step."""


@dataclass
class Part:
    """What a part's function gets.

    Attributes:
        folder: Its own, for stores; gone afterwards.
        store: Shared by all parts: trained teachers and their scores.
        tiny: Whether this is a trial on a processor.
        told: Writes what has been found so far.
        turn: Waits until nothing else is measured; to be called once, before the first measurement.
        words: Overrides of all parts.
    """

    folder: Path
    store: Path
    tiny: bool
    told: Callable[[dict[str, Any]], None]
    turn: Callable[[], None]
    words: tuple[str, ...]

    def all_words(self, *words: str) -> tuple[str, ...]:
        """Overrides of this part's command."""
        work = TINY if self.tiny else WORK
        return (*work, *self.words, f"teachers.store={self.store}", *words)

    def bench(self, *words: str) -> Bench:
        """Images, teachers and settings, ready to be measured."""
        settings = compose_settings(*self.all_words(*words))
        accelerator = str(settings.trainer.get("accelerator", "auto"))
        settings.trainer["precision"] = resolve_precision(settings.trainer.get("precision"), accelerator)
        device = torch.device("cpu" if self.tiny else "cuda")
        prepared = prepare(settings, accelerator)
        teachers = gather_teachers(prepared.teachers).to(device)
        steps, rounds = (2, 1) if self.tiny else (60, 3)
        return Bench(settings, prepared.dataset, teachers, device, rounds, steps, workers=worker_counts(device))


def steady(clock: Clock) -> dict[str, Any]:
    """What a training says of its speed once it runs: the first epoch warms up."""
    later = clock.epoch_rates[1:] or clock.epoch_rates
    return {
        "images_per_second": statistics.median(later),
        "by_epoch": clock.epoch_rates,
        "seconds_to_first_step": clock.first_step,
        "seconds_between_epochs": clock.between,
    }


def plain(part: Part) -> dict[str, Any]:
    """(a) The plain loop of ekd-bench, with the best number of workers."""
    bench = part.bench()
    part.turn()
    loop, seconds, tried = fastest_plain(bench, bench.job())
    rates = [loop.images_per_second(bench.plain_steps) for _ in range(bench.rounds)]
    workers = loop.loader.num_workers
    loop.close()
    return {
        "images_per_second": statistics.median(rates),
        "seconds_to_first_step": seconds,
        "workers": workers,
        "by_workers": tried,
    }


def careful(part: Part, mode: str) -> dict[str, Any]:
    """(b) The loop of a careful user, compiled in this mode, with a worker for each core."""
    bench = part.bench()
    loop = CarefulLoop(bench.job(), max(bench.workers), mode)
    seconds = seconds_of(loop.step, loop.device)
    part.told({"seconds_to_first_step": seconds})
    part.turn()
    for _ in range(2 * loop.loader.num_workers):
        loop.step()
    rates = [loop.images_per_second(2 * bench.plain_steps) for _ in range(bench.rounds)]
    loop.close()
    return {"images_per_second": statistics.median(rates), "workers": loop.loader.num_workers}


def ours(part: Part, form: str) -> dict[str, Any]:
    """(c) Through Lightning as ekd-train does it, from an empty table and from a full one."""
    # An eager step from an empty table is slow, so one measured epoch of it must do.
    epochs = 2 if form == "eager" else 3
    bench = part.bench(
        *FORMS[form], f"recipe.epochs={PLANNED_EPOCHS}", f"trainer.max_epochs={epochs}", "teachers.compile=never"
    )
    job = bench.job().with_store(part.folder)
    found: dict[str, Any] = {}
    if "compiled" in form:
        job.fit()  # fills the compiler's cache on disk, and the table
        part.turn()
    else:
        part.turn()
        found["cold"] = steady(job.fit().clock)
        part.told(found)
    return {**found, "warm": steady(job.fit().clock)}


def graph(part: Part) -> dict[str, Any]:
    """(d) The whole step as one graph without Lightning, and (h) where its time goes."""
    bench = part.bench("student.compile=never")
    job = bench.job().with_store(part.folder)
    job.fit()  # fills the table
    found: dict[str, Any] = {}
    part.turn()
    steps = 4 if part.tiny else 1000
    for form, compile_ in {"captured": "never", "captured and compiled": "always"}.items():
        student = replace(job.settings.student, compile="never" if part.tiny else compile_)
        start = time.perf_counter()
        loop = BareLoop(replace(job, settings=replace(job.settings, student=student)))
        loop.start_epoch(0)
        loop.run(10)
        seconds = time.perf_counter() - start
        images = steps * job.settings.recipe.batch_size
        found[form] = {
            "images_per_second": rate_of(partial(loop.run, steps), images, bench.device, bench.rounds)(),
            "seconds_to_first_step": seconds,
            "graphs": loop.num_graphs,
        }
        part.told(found)
        if not part.tiny:
            found[form]["profile"] = time_shares(partial(loop.run, 50), bench.device)
            part.told(found)
    return found


def teachers(part: Part) -> dict[str, Any]:
    """What the teachers alone allow: images per second of each, as they are asked ahead of an epoch."""
    bench = part.bench()
    frozen = FrozenTeachers(bench.teachers, TeacherFormat(compile="never"))
    count = min(frozen.chunk, len(bench.dataset.test))
    images = bench.dataset.test.images[:count].float().div(255).to(bench.device)
    part.turn()
    found = {}
    for m, identity in enumerate(bench.teachers.identities):
        frozen.outputs(m, images)
        ask = partial(frozen.outputs, m, images)
        found[identity.id] = rate_of(ask, count, bench.device, 10)()
    return {"images_per_second": found, "chunk": count, "format": frozen.numeric_format}


def maps(part: Part, method: str) -> dict[str, Any]:
    """(e) A method that compares maps of all teachers in every step: ours, then the plain loop."""
    bench = part.bench(f"method={method}", "method.teacher=null", "student.compile=never", "capture=auto")
    job = bench.job().with_store(part.folder)
    part.turn()
    found: dict[str, Any] = {"ours": steady(job.fit().clock)}
    part.told(found)
    loop = PlainLoop(job, max(bench.workers) if not part.tiny else 0)
    loop.started()
    rates = [loop.images_per_second(bench.plain_steps) for _ in range(bench.rounds)]
    loop.close()
    return {**found, "plain": {"images_per_second": statistics.median(rates)}}


def command(part: Part) -> dict[str, Any]:
    """(f) `ekd-train` as a command: seconds to its first step, and after its last one; caches warm and cold."""
    part.turn()
    found: dict[str, Any] = {}
    for cache in ("cold", "warm"):
        found[cache] = gpu_shared.timed_command(
            part.all_words("data.fraction=0.1"), part.folder / cache, part.folder / "store"
        )
        part.told(found)
    return found


def imports(part: Part) -> dict[str, Any]:
    """(f) The imports of PyTorch, Lightning and this package alone."""
    part.turn()
    return {"seconds": gpu_shared.import_seconds(part.folder)}


def many(part: Part, mps: bool) -> dict[str, Any]:
    """(g) 1, 2, 4 and 8 runs at once on the GPU, a process each; teachers' answers are in the table."""
    part.turn()
    words = part.all_words(
        "data.augmentation=none",  # one view, so that a table is full after one epoch
        "data.fraction=0.3",
        "recipe.epochs=100000",
        "student.compile=never",
        "teachers.compile=never",  # or eight processes compile at once, for a table that is full after one epoch
        "capture=auto",
        f"teachers.store={part.folder}",
    )
    return gpu_shared.many_at_once(
        words,
        "cpu" if part.tiny else "cuda",
        part.folder,
        mps=mps,
        seconds=1.0 if part.tiny else 4.0,
        counts=(1, 2) if part.tiny else (1, 2, 4, 8),
    )


def streams(part: Part) -> dict[str, Any]:
    """(g) 1, 2, 4 and 8 students of one process on streams of their own."""
    bench = part.bench("student.compile=never", "data.augmentation=none")
    job = bench.job().with_store(part.folder)
    job.fit()  # fills the table
    part.turn()
    counts, seconds = ((1, 2), 0.01) if part.tiny else ((1, 2, 4, 8), 3.0)
    return {"runs": gpu_shared.on_streams(job, seconds_each=seconds, counts=counts)}


GROUPS: list[dict[str, tuple[Callable[..., dict[str, Any]], float]]] = [
    {
        "plain": (plain, 60),
        "careful": (partial(careful, mode="default"), 110),
        "careful, reduce-overhead": (partial(careful, mode="reduce-overhead"), 110),
        "ours, captured and compiled": (partial(ours, form="captured and compiled"), 110),
        "ours, captured": (partial(ours, form="captured"), 60),
    },
    {
        "graph": (graph, 90),
        "ours, eager": (partial(ours, form="eager"), 90),
        "teachers": (teachers, 40),
        "maps, ekd": (partial(maps, method="ekd"), 60),
        "maps, camkd": (partial(maps, method="camkd"), 60),
        "maps, fitnet": (partial(maps, method="fitnet"), 60),
    },
    {"command": (command, 90), "imports": (imports, 60), "streams": (streams, 60)},
    {"many": (partial(many, mps=False), 90)},
    {"many, MPS": (partial(many, mps=True), 90)},
]
"""Part -> its function, and the seconds after which it is ended."""


def _child(function: Callable[..., dict[str, Any]], part: Part, file: Path, ready: Any, go: Any) -> None:
    """Runs a part in its own process group and leaves what it found in a file, again and again."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    found: dict[str, Any] = {"result": {}}
    start = time.perf_counter()

    def told(result: dict[str, Any]) -> None:
        found["result"] = found["result"] | result
        write_json(file, found)

    def turn() -> None:
        found["seconds_to_be_ready"] = time.perf_counter() - start
        ready.set()
        go.wait()
        found["began"] = time.perf_counter()

    part.told, part.turn = told, turn
    try:
        quiet_libraries()
        told(function(part))
    except BaseException as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if "began" in found:
        found["seconds"] = time.perf_counter() - found.pop("began")
    if torch.cuda.is_initialized():
        found["peak_gb"] = torch.cuda.max_memory_reserved() / 1e9
    write_json(file, found)
    sys.stdout.flush()
    os._exit(0)  # whatever threads and workers are left


def _end(process: Any) -> None:
    """Ends a part and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join(5)  # a process that waits for its driver may take longer


def run_group(
    group: dict[str, tuple[Callable[..., dict[str, Any]], float]], args: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Starts the parts of a group together and lets one after another measure."""
    context = multiprocessing.get_context(args.start)
    started_at, children = time.perf_counter(), {}
    for name, (function, limit) in group.items():
        own = folder / name.replace(", ", "-").replace(" ", "_")
        own.mkdir()
        ready, go = context.Event(), context.Event()
        nothing: Any = None
        part = Part(own, folder / "store", args.tiny, nothing, nothing, tuple(args.overrides))
        file = own / "found.json"
        process = context.Process(target=_child, args=(function, part, file, ready, go))
        process.start()
        children[name] = (process, ready, go, file, args.patience * limit)
    try:
        return _results(children, args, started_at)
    finally:  # of a run that is stopped, too
        for process, *_ in children.values():
            _end(process)


def _results(children: dict[str, Any], args: argparse.Namespace, started_at: float) -> dict[str, Any]:
    """Waits until the parts are ready, then lets one after another measure; returns what they found."""
    for process, ready, _, _, limit in children.values():
        while process.is_alive() and not ready.wait(0.1):
            if time.perf_counter() - started_at > min(limit, args.left()):
                _end(process)
    found = {}
    for name, (process, _, go, file, limit) in children.items():
        go.set()
        process.join(max(1.0, min(limit, args.left())))
        late = process.is_alive()
        _end(process)  # workers of its loaders, too
        found[name] = read_json(file) if file.is_file() else {"result": {}}
        if late:
            found[name].setdefault("error", "took too long")
        if not found[name]["result"]:
            found[name].setdefault("error", f"ended with exit code {process.exitcode}")
        problem = f"  {found[name]['error']}" if "error" in found[name] else ""
        print(f"[{time.perf_counter() - args.began:5.0f} s] {name}{problem}", file=sys.stderr, flush=True)
    return found


def _probe(on_gpu: bool) -> dict[str, Any]:
    """Versions and hardware, and whether this process can use the GPU."""
    if on_gpu:
        torch.zeros(1, device="cuda")
    return provenance()


def hardware(args: argparse.Namespace) -> dict[str, Any]:
    """Asks a process of its own: a parent that has used CUDA cannot fork others that do."""
    try:
        with multiprocessing.get_context(args.start).Pool(1) as pool:
            origin = pool.apply(_probe, (not args.tiny,))
    except RuntimeError as error:
        if "fork" not in str(error):
            raise
        args.start = "spawn"  # something that was imported has used CUDA
        with multiprocessing.get_context(args.start).Pool(1) as pool:
            origin = pool.apply(_probe, (not args.tiny,))
    del origin["working_directory"]  # says nothing to others
    origin["command"] = ["gpu.py", *args.overrides]
    commit = Path(__file__).resolve().parents[1] / "COMMIT"  # of a packed copy without git
    if origin.get("git") is None and commit.is_file():
        origin["git"] = {"commit": commit.read_text().strip()}
    return dict(origin)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all groups that the time allows, and writes the file anew after each."""
    quiet_libraries()
    found: dict[str, Any] = {
        "origin": hardware(args),
        "settings": [*(TINY if args.tiny else WORK), *args.overrides],
        "planned_epochs": PLANNED_EPOCHS,
        "parts": {},
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for group in GROUPS:
            wanted = {name: part for name, part in group.items() if name in args.parts}
            if args.left() < 10:
                found["parts"] |= {name: {"result": {}, "error": "no time left"} for name in wanted}
            elif wanted:
                found["parts"] |= run_group(wanted, args, folder)
            found["seconds"] = time.perf_counter() - args.began
            write_json(args.output, found)
    return found


def main() -> None:
    """The command."""
    names = [name for group in GROUPS for name in group]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings; with --page the JSON files")
    parser.add_argument("--output", type=Path, default=Path("speed_gpu.json"))
    parser.add_argument("--parts", type=lambda text: text.split("+"), default=names, help="+".join(names))
    parser.add_argument("--minutes", type=float, default=7.5, help="everything is ended then")
    parser.add_argument("--tiny", action="store_true", help="a trial on a processor")
    parser.add_argument("--patience", type=float, default=1.0, help="times the seconds that a part may take")
    parser.add_argument("--start", default="fork", choices=("fork", "spawn"), help="how parts are started")
    parser.add_argument("--page", type=Path, help="write speed_gpu.{md,json} of a JSON file into this folder")
    args = parser.parse_args()
    if args.page:
        gpu_page.write(args.page, gpu_page.merged([read_json(Path(name)) for name in args.overrides]))
        return
    unknown = [name for name in args.parts if name not in names]
    if unknown:
        parser.error(f"--parts: no part {unknown[0]!r}; there are {'+'.join(names)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the parts, too
    args.began = time.perf_counter()
    args.left = lambda: 60 * args.minutes - (time.perf_counter() - args.began)
    found = measure(args)
    print(gpu_page.table(found), flush=True)
    os._exit(0)  # without waiting for parts that cannot be ended


if __name__ == "__main__":
    main()
