"""Typed settings of a run, into which a command turns the configuration.

This module checks what needs no heavy import. Names in a registry (data set, network, method term) are checked by the
registry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Optional, get_type_hints

from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.roles import (
    ALLOWED,
    COMPUTED,
    COUNT,
    COUNT_OR_NONE,
    FREE,
    KEYS,
    LARGEST,
    LOCATION,
    NOT_NEGATIVE,
    PART,
    POSITIVE,
    PROTOCOL,
    PURPOSE,
    ROUNDING,
    SEED,
    SHARE,
    TEMPERATURE,
    WORDS,
    Purpose,
    Range,
    Role,
    beside,
    check_values,
    conditions,
    is_of,
    name_of_type,
    one_of,
    paths,
    purposes,
)

# `Optional[X]` and not `X | None`: OmegaConf reads these annotations as a schema.


def check_name(key: str, value: object) -> None:
    """Refuses a name for a folder that has path separators, control characters or a leading dot, or is empty."""
    fits = isinstance(value, str) and value.isprintable() and not re.search(r"[/\\]|^\.|^\s*$", value)
    _require(
        fits,
        key,
        value,
        "folders are named after it: it must not be empty, begin with a dot, or contain slashes or line breaks",
    )


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise UserError(f"{key}={value}: {allowed}")


_FROM_MINUS_ONE = {ALLOWED: Range(-1, LARGEST)}
_COMPILE = ("auto", "always", "never")
# Trainer flags with another role than COMPUTED, and the allowed values where Lightning would fail or misread others.
_TRAINER = {
    **dict.fromkeys(("enable_progress_bar", "enable_checkpointing"), FREE),
    **dict.fromkeys(("accelerator", "strategy", "threads", "deterministic", "benchmark"), ROUNDING),
    **dict.fromkeys(("inference_mode", "profiler", "detect_anomaly", "barebones"), ROUNDING),
    **dict.fromkeys(("enable_model_summary", "enable_autolog_hparams", "model_registry"), ROUNDING),
    "num_sanity_val_steps": ROUNDING | _FROM_MINUS_ONE,
    "log_every_n_steps": ROUNDING | COUNT_OR_NONE,
    "limit_predict_batches": ROUNDING,
    **dict.fromkeys(("precision", "devices"), PROTOCOL),
    "num_nodes": PROTOCOL | COUNT,
    **dict.fromkeys(("max_epochs", "max_time"), PART),
    "max_steps": PART | _FROM_MINUS_ONE,
    **dict.fromkeys((f"limit_{part}_batches" for part in ("train", "val", "test")), COMPUTED | POSITIVE),
    **dict.fromkeys(("min_epochs", "min_steps", "reload_dataloaders_every_n_epochs"), COMPUTED | COUNT_OR_NONE),
    **dict.fromkeys(("accumulate_grad_batches", "check_val_every_n_epoch"), COMPUTED | COUNT),
    **dict.fromkeys(("gradient_clip_val", "overfit_batches"), COMPUTED | NOT_NEGATIVE),
    "gradient_clip_algorithm": COMPUTED | one_of("norm", "value") | beside("gradient_clip_val"),
}

# Settings that have an effect only beside certain values of other settings.
_WITH_SOURCE = beside("source")
_CROPS = beside("augmentation", lambda names: "crop_flip" in names)
_POOL_OF_VIEWS = beside("augmentation", lambda names: names not in ("none", "crop_flip", ["none"], ["crop_flip"]))
_SGD = beside("optimizer", lambda name: name.lower() == "sgd")
_STEPS = beside("schedule", lambda name: name == "step")
_TRAINED = beside(
    "pool", lambda pool: any(isinstance(one, dict) and (one.get("train") or one.get("finetune")) for one in pool)
)
_TABLED = beside("table", lambda use: use != "off")
_BRANCHED = beside("branches", lambda count: count > 1)
_LOGGED = beside("enabled")


@dataclass
class DataSettings:
    """The data set, the training subset and the augmentation."""

    name: str = field(default="digits", metadata=PROTOCOL)
    """Registered data set: digits (bundled), cifar10, cifar100; with a `source`, the name of its data set."""
    source: Optional[str] = field(default=None, metadata=PROTOCOL)
    """Source of a data set that is not registered: folder (one subfolder per class), npz (a file), torchvision or
    huggingface (`name` is the data set's name there); null: a registered data set."""
    root: str = field(default="data", metadata=LOCATION)
    """Folder of the data set, or the folder above it."""
    cache: str = field(default="store/images", metadata=LOCATION)
    """Folder of decoded images, shared by all runs."""
    image_size: Any = field(default=None, metadata=PROTOCOL)
    """Size in pixels to which your own images are resized: the side of a square, or [height, width]; null: all images
    have the same size already."""
    test_fraction: float = field(default=0.2, metadata=PROTOCOL | {ALLOWED: Range(0, 1, True, True)} | _WITH_SOURCE)
    """Share of every class set aside as test images, by `subset_seed`, if the source has none of its own."""
    skip_broken: bool = field(default=False, metadata=PROTOCOL)
    """Whether to skip images that cannot be read."""
    download: bool = field(default=True, metadata=LOCATION)
    """Whether a run may download missing data."""
    fraction: Optional[float] = field(default=None, metadata=PROTOCOL | SHARE)
    """Share of the training images in (0, 1]; null: all of them, or `per_class`."""
    per_class: Optional[int] = field(default=None, metadata=PROTOCOL | COUNT)
    """Training images per class, instead of `fraction`."""
    subset_seed: int = field(default=0, metadata=PROTOCOL | SEED)
    """Seed of the nested subsets; not `seed`, so that all seeds of a study use the same images."""
    val_fraction: float = field(default=0.1, metadata=PROTOCOL | {ALLOWED: Range(0, 1, below=True)})
    """Share of the subset held out for validation, in [0, 1)."""
    unlabelled: Optional[str] = field(default=None, metadata=PROTOCOL | {WORDS: ("rest", "split")})
    """Images to train on without labels: a folder with any subfolders, `rest` for the training images outside the
    subset, `split` for the data set's own unlabelled split (STL10 of torchvision); null: none."""
    unlabelled_share: Optional[float] = field(default=None, metadata=PROTOCOL | {ALLOWED: Range(0, 1, True, True)})
    """Share of unlabelled images in each batch of `recipe.batch_size` images, in (0, 1); null: a half."""
    epoch: str = field(default="labelled", metadata=PROTOCOL | one_of("labelled", "unlabelled"))
    """Whether an epoch is one pass over the labelled or over the unlabelled images."""
    augmentation: Any = field(default="crop_flip", metadata=PROTOCOL)
    """none, crop_flip, resized_crop, cutout, random_erasing, color, randaugment, the class name of a transform of
    torchvision (GaussianBlur), or a list of these, applied in order."""
    augmentation_options: dict[str, Any] = field(default_factory=dict, metadata=PROTOCOL)
    """Options by the augmentation's name: `+data.augmentation_options.cutout.size=8` on the command line."""
    padding: Optional[int] = field(default=4, metadata=PROTOCOL | {ALLOWED: Range(0, 1024)} | _CROPS)
    """Pixels that crop_flip adds on every side; null: an eighth of the images' shorter side."""
    flip: bool = field(default=True, metadata=PROTOCOL | _CROPS)
    """Whether crop_flip also mirrors images."""
    pool_size: int = field(default=64, metadata=PROTOCOL | COUNT)
    """Augmented views per image, drawn once. none and crop_flip do not need it: their views are finite."""
    pool_seed: int = field(default=0, metadata=PROTOCOL | SEED | _POOL_OF_VIEWS)
    """Seed of these views; not `seed`, so that all runs of a study share the teacher tables."""
    eval_batch_size: int = field(default=500, metadata=ROUNDING | COUNT)


@dataclass
class RecipeSettings:
    """Optimiser and schedule: SGD with momentum by default, learning rate as a function of the epoch."""

    epochs: int = field(default=60, metadata=PROTOCOL | COUNT)
    batch_size: int = field(default=128, metadata=PROTOCOL | COUNT)
    """Images per batch, summed over all devices; one optimiser step, unless gradients are accumulated."""
    optimizer: str = field(default="sgd", metadata=COMPUTED)
    """sgd, adamw, or the name of another class of torch.optim, in upper or lower case."""
    optimizer_options: dict[str, Any] = field(default_factory=dict, metadata=COMPUTED)
    """Further arguments of that class: `recipe.optimizer=adamw recipe.optimizer_options={betas: [0.9, 0.95]}`."""
    lr: float = field(default=0.1, metadata=COMPUTED | POSITIVE)
    momentum: float = field(default=0.9, metadata=COMPUTED | {ALLOWED: Range(0, 1, below=True)} | _SGD)
    """Momentum of sgd; other optimisers ignore it, and `nesterov`."""
    nesterov: bool = field(default=True, metadata=COMPUTED | _SGD)
    weight_decay: float = field(default=5e-4, metadata=COMPUTED | NOT_NEGATIVE)
    schedule: str = field(default="cosine", metadata=COMPUTED | one_of("cosine", "step", "constant"))
    """cosine (to zero), step (times `gamma` at each milestone) or constant."""
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75], metadata=COMPUTED | _STEPS)
    """Points of the step schedule as shares of the training, in (0, 1)."""
    gamma: float = field(default=0.1, metadata=COMPUTED | POSITIVE | _STEPS)
    warmup_epochs: float = field(default=0.0, metadata=COMPUTED | NOT_NEGATIVE)
    ema: float = field(default=0.0, metadata=COMPUTED | {ALLOWED: Range(0, 1, below=True)})
    """Decay of a moving average of the student's weights, updated after every step; 0 for none. Its test scores are the
    fields `test_..._ema`. Teachers have no such average."""
    mixup: float = field(default=0.0, metadata=PROTOCOL | NOT_NEGATIVE)
    """α of mixup, 0 for none; if `cutmix` is on as well, each batch uses one of the two with equal probability."""
    cutmix: float = field(default=0.0, metadata=PROTOCOL | NOT_NEGATIVE)
    """α of CutMix, 0 for none."""

    def check(self, prefix: str) -> None:
        """Refuses impossible values by a `UserError`, which names their keys below `prefix`, e.g. "recipe"."""
        check_values(self, f"{prefix}.")
        _require(not self.nesterov or self.momentum > 0, f"{prefix}.nesterov", True, f"needs {prefix}.momentum > 0")
        inside = all(0 < m < 1 for m in self.milestones)
        _require(inside, f"{prefix}.milestones", self.milestones, "must be shares of the training in (0, 1)")
        fits = self.warmup_epochs < self.epochs
        _require(fits, f"{prefix}.warmup_epochs", self.warmup_epochs, f"must be below {prefix}.epochs={self.epochs}")

    def changed(self, changes: dict[str, Any], key: str) -> RecipeSettings:
        """This recipe with other values for some settings; messages name their keys below `key`.

        Raises:
            UserError: For an unknown setting, or a value of another type or outside its range.
        """
        hints = get_type_hints(RecipeSettings)
        for name, value in changes.items():
            if name not in hints:
                raise unknown_name(f"key of {key}", name, hints)
            _require(is_of(value, hints[name]), f"{key}.{name}", value, f"must be {name_of_type(hints[name])}")
        recipe = replace(self, **changes)
        if changes:
            recipe.check(key)
        return recipe

    def key(self) -> dict[str, Any]:
        """The recipe's part of a teacher's key in the store; newer settings are in it only if they are not default."""
        usual = {"optimizer": "sgd", "optimizer_options": {}, "ema": self.ema}
        return {name: value for name, value in asdict(self).items() if name not in usual or value != usual[name]}

    def mixed(self, prefix: str) -> str:
        """The keys of mixup and CutMix that are on, with their values; empty without any."""
        values = {name: getattr(self, name) for name in ("mixup", "cutmix")}
        return " and ".join(f"{prefix}.{name}={alpha}" for name, alpha in values.items() if alpha)


@dataclass
class TeacherEntry:
    """One member of the pool of teachers; exactly one of the first seven settings is given."""

    zoo: Optional[str] = None
    """Id of a pretrained network in the zoo."""
    file: Optional[str] = None
    """A safetensors file of this package, or (with `network` and `key_map`) a foreign checkpoint."""
    train: Optional[str] = None
    """Name of a network that is trained on demand and kept in the teacher store."""
    timm: Optional[str] = None
    """Name of a network of timm."""
    torchvision: Optional[str] = None
    """Name of a network of torchvision."""
    module: Optional[str] = None
    """PACKAGE.FUNCTION that returns a torch.nn.Module from images to logits; `imports` names the package."""
    hub: Optional[str] = None
    """USER/REPO of a timm network on the Hugging Face hub; only config.json and the safetensors file are read."""
    network: Optional[str] = None
    key_map: Optional[str] = None
    options: dict[str, Any] = field(default_factory=dict)
    normalization: Optional[str] = None
    seed: int = field(default=0, metadata=SEED)
    """Seed of the initialisation and the order of images of a teacher that is trained on demand."""
    weights: Optional[str] = None
    """File of weights for timm, torchvision and module; null or DEFAULT: the published weights, or those with which the
    module's function returns it."""
    state_key: Optional[str] = None
    """Key of the weights in a checkpoint, if it is not a usual one."""
    classes: Optional[list[Any]] = None
    """If the weights have other classes than the data: positions of the data's classes among those of the weights, or
    the names of the weights' classes."""
    stages: Optional[dict[str, str]] = None
    """Names of stages in order, each with the submodule that ends it; null: stages are found by the sizes of maps."""
    image_size: Optional[int] = field(default=None, metadata=COUNT)
    """Side in pixels to which images are resized for this teacher; null: the library's value."""
    finetune: Optional[str] = field(default=None, metadata=one_of("head", "all"))
    """head or all: trains a new classifier, or all weights, on the images of teachers.train_on; kept in the store."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from teachers.recipe."""

    @property
    def source(self) -> str:
        """The one of `_SOURCES` that is given."""
        return next(name for name in _SOURCES if getattr(self, name))


_LIBRARY = ("options", "normalization", "weights", "state_key", "classes", "stages", "image_size", "finetune")
_USEFUL = {
    "zoo": (),
    "file": ("network", "key_map", "options", "normalization"),
    "train": ("options", "normalization", "seed", "recipe"),
    **dict.fromkeys(("timm", "torchvision", "module"), _LIBRARY),
    "hub": tuple(name for name in _LIBRARY if name != "weights"),
}
"""Sources of a teacher, each with the settings that have an effect beside it; `finetune` adds `seed` and `recipe`."""
_SOURCES = tuple(_USEFUL)


@dataclass
class TeacherSettings:
    """The pool of teachers and how its members are obtained."""

    pool: list[Any] = field(default_factory=list, metadata=COMPUTED)
    """Mappings (see `TeacherEntry`) or ids of the zoo."""
    count: Optional[int] = field(default=None, metadata=COMPUTED | COUNT_OR_NONE | beside("method.name"))
    """Number of teachers: the first `count` members of the pool; null: all of them."""
    weights_dir: str = field(default="weights", metadata=LOCATION)
    """Folder of the zoo's files; missing ones are downloaded into it if `download` is true."""
    download: bool = field(default=True, metadata=LOCATION)
    train_on: str = field(default="subset", metadata=COMPUTED | one_of("subset", "all") | _TRAINED)
    """Training images of teachers that are trained on demand: the `subset` of the student, or `all` except `val/`."""
    recipe: RecipeSettings = field(default_factory=RecipeSettings, metadata=COMPUTED | _TRAINED)
    store: str = field(default="store", metadata=LOCATION)
    """Folder of trained teachers, their predictions for test images, and teacher tables, shared by all runs."""
    table: str = field(default="auto", metadata=ROUNDING | one_of("auto", "require", "off"))
    """Use of teacher tables: auto (if the augmentation is finite), require, or off."""
    table_stages: bool = field(default=False, metadata=ROUNDING | _TABLED)
    """Whether tables hold whole stage outputs, for methods that read them: 2 bytes a value, so 8 kB a row for the last
    stage of a CIFAR ResNet and 88 kB for all four, which may take longer to write than the teachers take to compute.
    Without them such methods run their teachers in every step. Averages over a small grid (a term's `grid`) are always
    in the tables."""
    table_budget_gb: float = field(default=20.0, metadata=ROUNDING | NOT_NEGATIVE | _TABLED)
    """Largest size of the tables of one run on disk, in GB."""
    fill: str = field(default="none", metadata=FREE | one_of("none", "run", "all"))
    """Rows of the tables that `ekd-teach` computes: none, run (those that a run with these settings reads) or all."""
    precision: str = field(default="auto", metadata=COMPUTED | one_of("auto", "float32", "bfloat16"))
    """Precision of frozen teachers: auto (bfloat16 where the hardware has it), float32 or bfloat16."""
    fold: bool = field(default=True, metadata=ROUNDING)
    """Whether batch norms of frozen teachers are folded into their convolutions."""
    compile: str = field(default="auto", metadata=ROUNDING | one_of(*_COMPILE))
    """Whether frozen teachers use torch.compile: auto (if the work is long enough to pay for it), always or never."""

    def check(self) -> None:
        """Refuses impossible values, and values that do not fit the pool, by a `UserError`."""
        pool = len(self.pool)
        check_values(self, "teachers.")
        if self.count is not None:
            _require(self.count <= pool, "teachers.count", self.count, f"the pool has only {pool} teachers")
        for position in range(pool):
            self.entry(position)
        self.recipe.check("teachers.recipe")
        _require(not self.recipe.ema, "teachers.recipe.ema", self.recipe.ema, "only the student's weights are averaged")

    def entry(self, position: int) -> TeacherEntry:
        """Returns pool member `position` (0-based) as a typed entry.

        An unknown key, or not exactly one way to obtain it, is a `UserError`.
        """
        node, key = self.pool[position], f"teachers.pool[{position}]"
        if isinstance(node, TeacherEntry):
            entry = node
        elif isinstance(node, str):
            entry = TeacherEntry(zoo=node)
        elif isinstance(node, dict):
            allowed = get_type_hints(TeacherEntry)
            for name, value in node.items():
                if name not in allowed:
                    raise unknown_name(f"key of {key}", name, allowed)
                fits = is_of(value, allowed[name])
                _require(fits, f"{key}.{name}", value, f"must be {name_of_type(allowed[name])}")
            entry = TeacherEntry(**node)
        else:
            raise UserError(f"{key}={node}: must be a zoo id or a mapping with one of {', '.join(_SOURCES)}")
        given = [name for name in _SOURCES if getattr(entry, name)]
        _require(len(given) == 1, key, given, f"give exactly one of {', '.join(_SOURCES)}")
        plain = TeacherEntry()
        useful = _USEFUL[given[0]]
        useful += ("seed", "recipe") if entry.finetune and "finetune" in useful else ()
        for one in fields(TeacherEntry):
            if one.name not in (*given, *useful) and getattr(entry, one.name) != getattr(plain, one.name):
                known = f"the settings {', '.join(useful)}" if useful else "no further settings"
                raise UserError(f"{key}.{one.name} has no effect together with {given[0]}, which takes {known}")
        if entry.finetune and entry.classes:
            raise UserError(f"{key}.classes has no effect together with finetune, which trains a new classifier")
        check_values(entry, f"{key}.")
        return entry


@dataclass
class StudentSettings:
    """The student: a compact network, and its branches."""

    network: str = field(default="resnet8", metadata=COMPUTED)
    options: dict[str, Any] = field(default_factory=dict, metadata=COMPUTED)
    branches: int = field(default=3, metadata=COMPUTED | {ALLOWED: Range(1, 1000)})
    split_after: str = field(default="stage3", metadata=COMPUTED | _BRANCHED)
    """Last stage that the branches share, or `none` for separate networks; after the last stage branches are heads."""
    branch_width: Optional[float] = field(default=None, metadata=COMPUTED | POSITIVE | _BRANCHED)
    """Factor of the channels in the branches' own stages, for CIFAR ResNets: 0.5 makes thin branches on a trunk of the
    usual width; null: branches are as wide as the network."""
    ensemble: str = field(default="mean_logits", metadata=COMPUTED)
    branch_gradients: str = field(default="mean", metadata=COMPUTED | _BRANCHED | one_of("mean", "sum"))
    """Gradient of a branch's own weights: mean (1/K of a plain network's, if losses are means over K branches) or sum
    (K times that). The trunk learns from the mean in both cases."""
    reuse_classifier: bool = field(default=False, metadata=COMPUTED)
    """Whether every branch ends with a projector into its teacher's features and the teacher's frozen classifier,
    instead of a head of its own (SimKD)."""
    normalization: Optional[str] = field(default=None, metadata=COMPUTED)
    """Name of a normalisation; null: that of the data set."""
    compile: str = field(default="auto", metadata=ROUNDING | one_of(*_COMPILE))
    """Whether training steps use torch.compile: auto (in runs that are long enough to pay for it), always or never."""


@dataclass
class ChainSettings:
    """How the assistants of `method.assistants` are trained."""

    recipe: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the run's `recipe`: `+method.chain.recipe.epochs=240` on the command line."""
    temperature: Optional[float] = field(default=None, metadata=TEMPERATURE)
    """T; null: that of the method."""
    ce_weight: Optional[float] = None
    """1 - λ of the paper; null: the weight of the method's ce_ensemble, see `chain.link_terms`."""
    kd_weight: Optional[float] = None
    """λ of the paper, > 0; null: the weight of the method's kd_ensemble, see `chain.link_terms`."""


@dataclass
class MethodSettings:
    """A named list of weighted loss terms."""

    name: str = field(default="ekd", metadata=COMPUTED)
    temperature: Optional[float] = field(default=None, metadata=COMPUTED | TEMPERATURE)
    """T of all terms without a temperature of their own; null: 4."""
    assignment: Any = field(default=None, metadata=COMPUTED)
    """one_to_one (also null), mean, permuted, random, the teacher of each branch ([2, 0, 1] or "2,0,1", from 0),
    explicit rows [K, M], or {schedule: [[0, one_to_one], [0.8, permuted]]} of these by shares of the training."""
    teacher: Optional[str] = field(default=None, metadata=COMPUTED | one_of("best", "first", "mean"))
    """For methods with a single teacher: best (of the pool, on the validation split), first, or mean (of the logits;
    losses of features, relations and the boundary are averaged over teachers); null: all teachers teach, by the
    assignment."""
    assistants: Optional[list[Any]] = field(default=None, metadata=COMPUTED)
    """Networks between teachers and student, from large to small: names, or mappings with network, options and seed.
    Each learns from the one before it, the student from the last one only; empty or null: no assistants."""
    chain: ChainSettings = field(default_factory=ChainSettings, metadata=COMPUTED | beside("assistants"))
    terms: dict[str, Any] = field(default_factory=dict, metadata=COMPUTED)


@dataclass
class WandbSettings:
    """Weights & Biases; null settings follow its environment variables."""

    enabled: bool = False
    mode: Optional[str] = field(default=None, metadata=one_of("online", "offline", "disabled", "shared") | _LOGGED)
    """Null: WANDB_MODE, else online."""
    project: Optional[str] = field(default=None, metadata=_LOGGED)
    """Null: WANDB_PROJECT, else `ekd-lightning`."""
    entity: Optional[str] = field(default=None, metadata=_LOGGED)
    group: Optional[str] = field(default=None, metadata=_LOGGED)
    """Null: WANDB_RUN_GROUP, else the sweep's name."""
    tags: list[str] = field(default_factory=list, metadata=_LOGGED)
    notes: Optional[str] = field(default=None, metadata=_LOGGED)
    log_model: bool = field(default=False, metadata=_LOGGED)


@dataclass
class LoggerSettings:
    """Loggers of curves besides metrics.csv, which is always written."""

    wandb: WandbSettings = field(default_factory=WandbSettings)
    tensorboard: bool = False


EVALUATION_PARTS = ("predictions", "generalisation", "flatness", "corruptions", "efficiency")
"""Parts of the evaluation of a trained student, in the order in which they are run."""


@dataclass
class EvaluationSettings:
    """Evaluation of the trained student besides its test scores."""

    parts: list[str] = field(default_factory=lambda: ["predictions", "generalisation"])
    """Parts that follow the training; `ekd-evaluate` adds others to a finished run."""

    def check(self) -> None:
        """Refuses unknown parts by a `UserError`."""
        for name in self.parts:
            if name not in EVALUATION_PARTS:
                raise unknown_name("part in evaluation.parts", name, EVALUATION_PARTS)


RETURNABLE = (
    "test_accuracy",
    "test_accuracy_best",
    "test_accuracy_last",
    "test_accuracy_ema",
    "test_nll",
    "test_ece",
    "test_brier",
    "val_accuracy",
    "val_accuracy_best",
    "num_parameters",
    "macs",
    "train_seconds",
    "images_per_second",
)
"""Fields of a result that a sweeper may optimise."""


@dataclass
class Settings:
    """Everything that determines a run."""

    data: DataSettings = field(default_factory=DataSettings)
    teachers: TeacherSettings = field(default_factory=TeacherSettings)
    student: StudentSettings = field(default_factory=StudentSettings)
    method: MethodSettings = field(default_factory=MethodSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    trainer: dict[str, Any] = field(default_factory=dict, metadata={**COMPUTED, KEYS: _TRAINER})
    """Arguments of pytorch_lightning.Trainer, and `precision: auto` and `threads`, which this package adds."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings, metadata=FREE)
    logger: LoggerSettings = field(default_factory=LoggerSettings, metadata=FREE)
    callbacks: dict[str, Any] = field(default_factory=dict, metadata=PART)
    """Additional Lightning callbacks, each a node with `_target_`."""
    seed: int = field(default=0, metadata=COMPUTED | SEED)
    channels_last: bool = field(default=True, metadata=ROUNDING)
    """Whether images and convolutions are channels-last in memory, where torch's kernels are safe with it; results
    change within rounding."""
    capture: str = field(default="auto", metadata=ROUNDING | one_of(*_COMPILE))
    """Whether training steps are recorded as CUDA graphs: auto (on a single CUDA device, if the run allows it), always
    (also on a CPU, where the same step runs unrecorded) or never. Results change within rounding."""
    metric: str = field(default="val_accuracy", metadata=FREE | one_of(*RETURNABLE))
    """Field of result.json that a run returns to a sweeper."""
    tags: list[str] = field(default_factory=list, metadata=FREE)
    imports: list[str] = field(default_factory=list, metadata=ROUNDING)
    """Your own modules, imported before names are looked up; the working directory is searched first."""
    resume: Optional[str] = field(default=None, metadata=FREE)
    """Directory of a stopped run that is continued in place."""
    overwrite: bool = field(default=False, metadata=FREE)
    """Whether the run may replace an earlier run in its directory; it does so after all its checks have passed."""

    def check(self) -> None:
        """Refuses settings that are impossible for any data set by a `UserError`."""
        check_values(self)
        check_name("method.name", self.method.name)
        self.recipe.check("recipe")
        self._check_unlabelled()
        self._check_length()
        self.teachers.check()
        self.evaluation.check()

    def _check_unlabelled(self) -> None:
        data, without = self.data, "has no effect without data.unlabelled"
        if data.unlabelled is None:
            _require(data.unlabelled_share is None, "data.unlabelled_share", data.unlabelled_share, without)
            _require(data.epoch == "labelled", "data.epoch", data.epoch, without)
        elif mixed := self.recipe.mixed("recipe"):
            _require(False, "data.unlabelled", data.unlabelled, f"images without labels cannot be mixed ({mixed})")

    def _check_length(self) -> None:
        epochs, most = self.recipe.epochs, self.trainer.get("max_epochs")
        fits = most is None or (type(most) is int and 1 <= most <= epochs)
        allowed = f"must be from 1 to recipe.epochs={epochs}; fewer epochs stop the training early, to be resumed"
        _require(fits, "trainer.max_epochs", most, allowed)
        least, last = self.trainer.get("min_epochs") or 0, most or epochs
        _require(least <= last, "trainer.min_epochs", least, f"must be at most {last}, the epochs of the training")
        least, last = self.trainer.get("min_steps") or 0, self.trainer.get("max_steps", -1)
        _require(last != 0, "trainer.max_steps", last, "leaves nothing to train; -1 sets no limit")
        _require(last == -1 or least <= last, "trainer.min_steps", least, f"is above trainer.max_steps={last}")


_PURPOSES = dict(purposes(Settings))
_CONDITIONS = tuple(conditions(Settings))
_PATHS: dict[str, tuple[str, ...]] = dict(paths(Settings))


def purpose_of(key: str) -> Purpose:
    """The purpose of a setting by its dotted key; an unknown setting counts as changing the results."""
    known = key
    while known not in _PURPOSES:
        if not known:
            return COMPUTED[PURPOSE]
        known = known.rpartition(".")[0]
    return _PURPOSES[known]


def without_effect(settings: Settings, given: Collection[str], facts: Mapping[str, object]) -> dict[str, str]:
    """Finds given settings that have no effect, because they depend on another setting with a certain value.

    Given keys with their default value are ignored. `facts` are, by key of the other setting, facts that decide instead
    of its value. Returns one line for each setting without effect, by its key.
    """
    found = {}
    for key, other, counts in _CONDITIONS:
        words = [word for word in given if f"{word}.".startswith(f"{key}.")]
        changed = words and _value(settings, key) != _value(Settings(), key)
        if changed and not counts(facts.get(other, _value(settings, other))):
            for word in words:
                value, beside_value = (f"{_value(settings, name)!s:.60}" for name in (word, other))
                found[word] = f"{word}={value} has no effect with {other}={beside_value}"
    return found


def _value(settings: object, key: str) -> Any:
    """A setting by its dotted key; None where a mapping lacks it."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else getattr(settings, name, None)
    return settings


def keys_where(holds: Callable[[str], bool]) -> tuple[str, ...]:
    """The dotted keys that fulfil a condition, in the order of the settings."""
    return tuple(key for key in _PURPOSES if holds(key))


def is_location(key: str) -> bool:
    """Whether a setting is a location."""
    return purpose_of(key).role is Role.LOCATION


def is_path(key: str) -> bool:
    """Whether a setting can be a path: all locations except `download`, and `data.unlabelled`."""
    return key in _PATHS


def is_place(key: str, value: object) -> bool:
    """Whether a value of a setting is a path, whose content a run records by its hash."""
    return isinstance(value, str) and key in _PATHS and value not in _PATHS[key]


def is_free(key: str, *, exact: bool = True) -> bool:
    """Whether a setting may change without changing the results: a location or a free setting.

    The results are to be equal bit for bit; `exact=False` allows rounding.
    """
    purpose = purpose_of(key)
    return is_location(key) or (purpose.role is Role.FREE and (purpose.exact or not exact))


def may_change_between_parts(key: str) -> bool:
    """Whether a setting may change when a stopped run is resumed."""
    return is_free(key) or purpose_of(key).between_parts
