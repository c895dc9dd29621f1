"""`ekd-tune`: a method's weights and temperature, chosen on the validation split with a fixed budget of trials."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from ekd_lightning.cli.train import quiet_libraries
from ekd_lightning.config.build import build, import_user_modules
from ekd_lightning.config.config import register_schema, to_plain, to_settings
from ekd_lightning.config.edge import one_line
from ekd_lightning.errors import UserError
from ekd_lightning.studies.tuned import read_overrides, show_outcome, warn_of_other_budgets, write_outcome

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback

    from ekd_lightning.pipeline.prepare import Prepared
    from ekd_lightning.settings import Settings
    from ekd_lightning.studies.search_space import SearchSpace

log = logging.getLogger(__name__)

PROGRAM = "ekd-tune"
EXAMPLES = """\
examples:
  ekd-tune --trials 20 --output tuned/c10 method=ekd experiment=cifar10_limited
  ekd-tune --trials 20 --output tuned/c10 method=kd_mean experiment=cifar10_limited   the same budget
  ekd-tune --trials 20 --output tuned/lr --space space.yaml --epochs 15 --seeds 0,1 method=ce
  ekd-train method=ekd experiment=cifar10_limited $(ekd-tune --print tuned/c10/ekd.yaml)

The same command again goes on with a stopped study; several at once share it. The test set is not read.
Overrides are those of ekd-train; what they set is not searched. See docs/tuning.md.
"""

# Lines of every single run stay out of the terminal, unless --verbose asks for them.
_TALKS = (
    __name__,
    "ekd_lightning.studies.tuned",
    "ekd_lightning.studies.tuning",
    "ekd_lightning.training.pool",
)
# Keys that do not change what a trial finds, or that a study sets itself.
_FREE = (
    "data.root",
    "data.download",
    "teachers.weights_dir",
    "teachers.download",
    "teachers.store",
    "teachers.table",
    "teachers.table_budget_gb",
    "teachers.fill",
    "logger",
    "trainer.enable_progress_bar",
    "trainer.enable_checkpointing",
    "metric",
    "tags",
    "seed",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `ekd-tune`.

    Args:
        argv: Arguments without the command's name; those of the process if None.
    """
    args = _parser().parse_intermixed_args(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(lambda r: args.verbose or r.levelno >= logging.WARNING or r.name in _TALKS)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    with one_line(PROGRAM):
        if args.print:
            print(*read_overrides(args.print), sep="\n")
        else:
            tune(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Choose a method's weights and temperature on the validation split.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for ekd-train")
    parser.add_argument("--output", type=Path, help="folder for <method>.yaml and the study")
    parser.add_argument(
        "--trials", type=int, default=20, help="trials in all, earlier ones too (default: 20)"
    )
    parser.add_argument("--epochs", type=int, help="epochs of a trial (default: recipe.epochs)")
    parser.add_argument("--seeds", default="0", help="a trial's value is the mean over these (default: 0)")
    parser.add_argument("--timeout", type=float, metavar="S", help="start no trial after S seconds")
    parser.add_argument(
        "--space", type=Path, metavar="FILE", help="YAML: key -> {low, high, log} or {choices}"
    )
    parser.add_argument("--sampler-seed", type=int, default=0, help="of what is tried (default: 0)")
    parser.add_argument("--no-prune", action="store_true", help="never stop a hopeless trial early")
    parser.add_argument("--verbose", action="store_true", help="show the lines of every run")
    parser.add_argument("--print", type=Path, metavar="FILE", help="print the overrides of a result, and end")
    return parser


def tune(args: argparse.Namespace) -> None:
    """Runs a study up to its budget and leaves `<method>.yaml`.

    Raises:
        UserError: For a user's mistake.
    """
    seeds = _check(args)
    quiet_libraries()
    _need_optuna()
    from ekd_lightning.studies import search_space, trials, tuning  # noqa: PLC0415 (slow; --help needs none)

    base = [*args.overrides, *([] if args.epochs is None else [f"recipe.epochs={args.epochs}"])]
    cfg = _compose(base)
    settings, plain = to_settings(cfg), to_plain(cfg)
    import_user_modules(settings.imports)
    prepared = _prepare(settings)
    space = _search_space(args.space, base, settings, prepared)
    facts = _facts(args, seeds, settings, prepared, space)
    warn_of_other_budgets(args.output, facts)
    identity = {
        "config": _without_free(plain),
        "space": facts["space"],
        "seeds": seeds,
        "sampler_seed": args.sampler_seed,
    }
    opened = trials.TuningStudy(
        args.output / settings.method.name,
        identity,
        space,
        search_space.default_values(space, plain),
        seed=args.sampler_seed,
        warmup_steps=None if args.no_prune else settings.recipe.epochs // 3,
    )

    def callbacks() -> list[Callback]:
        nodes = {name: node for name, node in settings.callbacks.items() if node}
        return [build(node, f"callbacks.{name}", settings.imports) for name, node in nodes.items()]

    try:
        tuning.run_trials(
            opened,
            tuning.ValidationObjective(
                lambda words: to_settings(_compose(_with(base, words))), seeds, callbacks
            ),
            trials=args.trials if space else 1,
            timeout=args.timeout,
            after_trial=lambda: write_outcome(args.output, opened, facts),
        )
        write_outcome(args.output, opened, facts)
        show_outcome(args.output, opened, facts)
    finally:
        opened.close()


def _search_space(path: Path | None, base: list[str], settings: Settings, prepared: Prepared) -> SearchSpace:
    """The user's search space, checked, or the method's own."""
    from ekd_lightning.studies.search_space import derive_space, read_space  # noqa: PLC0415

    if path is not None:
        space = read_space(path)
        _try_ends(base, space)
        return space
    fixed = {_key(word) for word in base}
    space = derive_space(prepared.method, settings.method.temperature, fixed)
    if not space:
        name = settings.method.name
        log.warning("method=%s: nothing to search, so one trial is enough (see --space)", name)
    return space


def _check(args: argparse.Namespace) -> list[int]:
    """The seeds; refuses options that cannot be."""
    if args.output is None:
        raise UserError("--output: must be given, a folder for <method>.yaml and the study")
    for name, low in (("trials", 1), ("epochs", 1), ("sampler_seed", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')}={value}: must be at least {low}")
    if args.timeout is not None and not args.timeout > 0:
        raise UserError(f"--timeout={args.timeout:g}: must be positive")
    words = args.seeds.split(",")
    if not all(word.strip().isdecimal() for word in words) or len({int(word) for word in words}) < len(words):
        raise UserError(f"--seeds={args.seeds}: give different whole numbers, e.g. 0,1,2")
    return [int(word) for word in words]


def _need_optuna() -> None:
    try:
        import optuna  # noqa: F401, PLC0415
    except ModuleNotFoundError:
        raise UserError("ekd-tune needs Optuna: pip install 'ekd-lightning[tune]'") from None


def _compose(overrides: Sequence[str]) -> DictConfig:
    register_schema()
    with initialize_config_module("ekd_lightning.conf", version_base="1.3"):
        return compose("train", overrides=list(overrides))


def _key(word: str) -> str:
    return word.split("=", 1)[0].lstrip("+~")


def _with(base: list[str], overrides: Sequence[str]) -> list[str]:
    """The command line with a trial's values; it may not say the same key twice."""
    replaced = {_key(word) for word in overrides}
    return [*(word for word in base if _key(word) not in replaced), *overrides]


def _prepare(settings: Settings) -> Prepared:
    """Makes all checks that a run makes before it trains, and those of a study."""
    from ekd_lightning.pipeline.prepare import prepare  # noqa: PLC0415

    if settings.resume is not None:
        raise UserError(f"resume={settings.resume}: has no meaning here; the same --output goes on")
    devices = settings.trainer.get("devices", 1)
    if devices not in (1, "1") and not (isinstance(devices, list) and len(devices) == 1):
        raise UserError(
            f"trainer.devices={devices}: a trial has one device; start several processes with one --output"
        )
    if not re.fullmatch(r"\w[\w.+@-]*", settings.method.name):
        raise UserError(
            f"method.name={settings.method.name}: names files here; use letters, digits and _.+@-"
        )
    prepared = prepare(settings, str(settings.trainer.get("accelerator", "auto")))
    if not prepared.datamodule.num_val_images:
        raise UserError(
            f"data.val_fraction={settings.data.val_fraction:g}: leaves no validation images to choose by; "
            "set e.g. data.val_fraction=0.1"
        )
    return prepared


def _try_ends(base: list[str], space: SearchSpace) -> None:
    """Composes and checks runs with the ends and choices of a user's space, so that mistakes show at once."""
    from ekd_lightning.studies.search_space import override  # noqa: PLC0415

    probes = {key: values.probes() for key, values in space.items()}
    for position in range(max(len(values) for values in probes.values())):
        words = [override(key, values[position % len(values)]) for key, values in probes.items()]
        _prepare(to_settings(_compose(_with(base, words))))


def _without_free(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The configuration without the keys that may differ between the processes of a study."""
    return {
        key: _without_free(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in plain.items()
        if f"{prefix}{key}" not in _FREE
    }


def _facts(
    args: argparse.Namespace, seeds: list[int], settings: Settings, prepared: Prepared, space: SearchSpace
) -> dict[str, Any]:
    """What a result says of how it was found."""
    from ekd_lightning.studies.search_space import describe_space  # noqa: PLC0415

    return {
        "method": settings.method.name,
        "budget": args.trials,
        "seeds": seeds,
        "sampler_seed": args.sampler_seed,
        "validation_images": prepared.datamodule.num_val_images,
        "protocol": {
            "data": prepared.dataset.name,
            "fraction": prepared.subset.fraction,
            "val_fraction": settings.data.val_fraction,
            "subset_seed": settings.data.subset_seed,
            "subset_sha256": prepared.subset.sha256,
            "views": prepared.views.key,
            "epochs": settings.recipe.epochs,
            "batch_size": settings.recipe.batch_size,
            "student": settings.student.network,
            "branches": prepared.student.num_branches,
            "teachers": [plan.id for plan in prepared.candidates or prepared.teachers],
        },
        "space": describe_space(space),
    }


if __name__ == "__main__":
    main()
