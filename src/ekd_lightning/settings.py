"""Typed settings of a run: what the configuration is turned into at the edge.

Names that are looked up in a registry (data set, network, method term) are checked where the registry is;
this module checks what can be checked without importing anything heavy.
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
    """Refuses a name that could not be one of a file or folder, as directories of runs have it.

    Raises:
        UserError: For separators of paths, control characters, a leading dot, and nothing at all.
    """
    fits = isinstance(value, str) and value.isprintable() and not re.search(r"[/\\]|^\.|^\s*$", value)
    _require(fits, key, value, "names folders: no separators, line breaks or leading dot")


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise UserError(f"{key}={value}: {allowed}")


_FROM_MINUS_ONE = {ALLOWED: Range(-1, LARGEST)}
_COMPILE = ("auto", "always", "never")
# Flags of the trainer that do not change what is computed, or not as all others do, and values that Lightning takes
# for what they do not mean, or fails with.
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

# What some settings count only beside.
_OWN = beside("source")
_CROPS = beside("augmentation", lambda names: "crop_flip" in names)
_DRAWN = beside("augmentation", lambda names: names not in ("none", "crop_flip", ["none"], ["crop_flip"]))
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
    """Which images, how many of them, and how they are augmented."""

    name: str = field(default="digits", metadata=PROTOCOL)
    """Registered data set: digits (bundled), cifar10, cifar100; of images of your own, what they are called."""
    source: Optional[str] = field(default=None, metadata=PROTOCOL)
    """Where other images come from: folder (one subfolder a class), npz (a file), torchvision or huggingface (`name` as
    they call the data set); null: a registered data set."""
    root: str = field(default="data", metadata=LOCATION)
    """Folder that holds (or receives) the data set's own folder, or is it."""
    cache: str = field(default="store/images", metadata=LOCATION)
    """Folder of decoded images, which runs share."""
    image_size: Any = field(default=None, metadata=PROTOCOL)
    """Pixels of the squares that images of your own become, or [height, width]; null: they have one size already."""
    test_fraction: float = field(default=0.2, metadata=PROTOCOL | {ALLOWED: Range(0, 1, True, True)} | _OWN)
    """Share of every class that is set aside for testing, by `subset_seed`, where there are no images for that."""
    skip_broken: bool = field(default=False, metadata=PROTOCOL)
    """Whether to go on without images that cannot be read."""
    download: bool = field(default=True, metadata=LOCATION)
    """Whether a run may obtain missing data."""
    fraction: Optional[float] = field(default=None, metadata=PROTOCOL | SHARE)
    """Share of the training images in (0, 1]; null means all, or what `per_class` says."""
    per_class: Optional[int] = field(default=None, metadata=PROTOCOL | COUNT)
    """Training images per class, instead of `fraction`."""
    subset_seed: int = field(default=0, metadata=PROTOCOL | SEED)
    """Which nested family of subsets; apart from `seed`, so that all seeds of a study see the same images."""
    val_fraction: float = field(default=0.1, metadata=PROTOCOL | {ALLOWED: Range(0, 1, below=True)})
    """Share of the subset held out for validation, in [0, 1)."""
    unlabelled: Optional[str] = field(default=None, metadata=PROTOCOL | {WORDS: ("rest", "split")})
    """Images to train on without labels: a folder of any shape, `rest` for the training images that the subset leaves
    out, `split` for the data set's own (STL10 of torchvision); null: none."""
    unlabelled_share: Optional[float] = field(default=None, metadata=PROTOCOL | {ALLOWED: Range(0, 1, True, True)})
    """Their share of each batch of `recipe.batch_size` images, in (0, 1); null: a half."""
    epoch: str = field(default="labelled", metadata=PROTOCOL | one_of("labelled", "unlabelled"))
    """Whether an epoch is one pass over the labelled images, or over the unlabelled ones."""
    augmentation: Any = field(default="crop_flip", metadata=PROTOCOL)
    """none, crop_flip, resized_crop, cutout, random_erasing, color, randaugment, a transform of torchvision by the
    name of its class (GaussianBlur), or a list of them, applied in order."""
    augmentation_options: dict[str, Any] = field(default_factory=dict, metadata=PROTOCOL)
    """Options by the augmentations' names: `+data.augmentation_options.cutout.size=8` on the command line."""
    padding: Optional[int] = field(default=4, metadata=PROTOCOL | {ALLOWED: Range(0, 1024)} | _CROPS)
    """Of crop_flip: pixels added on every side; null: an eighth of the images' shorter side."""
    flip: bool = field(default=True, metadata=PROTOCOL | _CROPS)
    """Of crop_flip: whether images are mirrored, too."""
    pool_size: int = field(default=64, metadata=PROTOCOL | COUNT)
    """Draws per image for any augmentation but plain none and crop_flip, whose views are finite by themselves."""
    pool_seed: int = field(default=0, metadata=PROTOCOL | SEED | _DRAWN)
    """Seed of these draws; apart from `seed`, so that all runs of a study share the teachers' tables."""
    eval_batch_size: int = field(default=500, metadata=ROUNDING | COUNT)


@dataclass
class RecipeSettings:
    """Optimiser and schedule: SGD with momentum by default, learning rate as a function of the epoch."""

    epochs: int = field(default=60, metadata=PROTOCOL | COUNT)
    batch_size: int = field(default=128, metadata=PROTOCOL | COUNT)
    """Images per batch over all devices together (an optimiser step, unless gradients are accumulated)."""
    optimizer: str = field(default="sgd", metadata=COMPUTED)
    """sgd, adamw, or the name of any other class of torch.optim, in upper or lower case."""
    optimizer_options: dict[str, Any] = field(default_factory=dict, metadata=COMPUTED)
    """Further arguments of that class: `recipe.optimizer=adamw recipe.optimizer_options={betas: [0.9, 0.95]}`."""
    lr: float = field(default=0.1, metadata=COMPUTED | POSITIVE)
    momentum: float = field(default=0.9, metadata=COMPUTED | {ALLOWED: Range(0, 1, below=True)} | _SGD)
    """Of sgd alone, as is `nesterov`."""
    nesterov: bool = field(default=True, metadata=COMPUTED | _SGD)
    weight_decay: float = field(default=5e-4, metadata=COMPUTED | NOT_NEGATIVE)
    schedule: str = field(default="cosine", metadata=COMPUTED | one_of("cosine", "step", "constant"))
    """cosine (to zero), step (times `gamma` at each milestone) or constant."""
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75], metadata=COMPUTED | _STEPS)
    """Points of the step schedule as shares of the training, in (0, 1)."""
    gamma: float = field(default=0.1, metadata=COMPUTED | POSITIVE | _STEPS)
    warmup_epochs: float = field(default=0.0, metadata=COMPUTED | NOT_NEGATIVE)
    ema: float = field(default=0.0, metadata=COMPUTED | {ALLOWED: Range(0, 1, below=True)})
    """Decay of a moving average of the student's weights, taken after every step; 0 for none. Its test scores are the
    fields `test_..._ema`. Of the student's recipe alone."""
    mixup: float = field(default=0.0, metadata=PROTOCOL | NOT_NEGATIVE)
    """α of mixup, 0 for none; with `cutmix` on, too, either is taken with equal chance in each batch."""
    cutmix: float = field(default=0.0, metadata=PROTOCOL | NOT_NEGATIVE)
    """α of CutMix, 0 for none."""

    def check(self, prefix: str) -> None:
        """Refuses impossible values, naming them with `prefix` (e.g. "recipe").

        Raises:
            UserError: At the first value outside its range.
        """
        check_values(self, f"{prefix}.")
        _require(not self.nesterov or self.momentum > 0, f"{prefix}.nesterov", True, f"needs {prefix}.momentum > 0")
        inside = all(0 < m < 1 for m in self.milestones)
        _require(inside, f"{prefix}.milestones", self.milestones, "must be shares of the training in (0, 1)")
        fits = self.warmup_epochs < self.epochs
        _require(fits, f"{prefix}.warmup_epochs", self.warmup_epochs, f"must be below {prefix}.epochs={self.epochs}")

    def changed(self, changes: dict[str, Any], key: str) -> RecipeSettings:
        """This recipe with other values for some settings, which messages call `key`.

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
        """A recipe's part of a store's key; what came later counts only where it is not left at its default."""
        usual = {"optimizer": "sgd", "optimizer_options": {}, "ema": self.ema}
        return {name: value for name, value in asdict(self).items() if name not in usual or value != usual[name]}

    def mixed(self, prefix: str) -> str:
        """The keys by which images are mixed, with their values; empty if they are not."""
        values = {name: getattr(self, name) for name in ("mixup", "cutmix")}
        return " and ".join(f"{prefix}.{name}={alpha}" for name, alpha in values.items() if alpha)


@dataclass
class TeacherEntry:
    """One member of the pool: exactly one of the first seven is set."""

    zoo: Optional[str] = None
    """Id of a pretrained network in the zoo."""
    file: Optional[str] = None
    """A safetensors file of this package, or (with `network` and `key_map`) a foreign checkpoint."""
    train: Optional[str] = None
    """Network to train on demand; kept in the teacher store."""
    timm: Optional[str] = None
    """Name of a network of timm."""
    torchvision: Optional[str] = None
    """Name of a network of torchvision."""
    module: Optional[str] = None
    """PACKAGE.FUNCTION that returns a torch.nn.Module from images to logits; `imports` names the package."""
    hub: Optional[str] = None
    """USER/REPO of a timm network on the Hugging Face hub; its safetensors file is read, nothing else."""
    network: Optional[str] = None
    key_map: Optional[str] = None
    options: dict[str, Any] = field(default_factory=dict)
    normalization: Optional[str] = None
    seed: int = field(default=0, metadata=SEED)
    """Initialisation and order of a teacher trained on demand."""
    weights: Optional[str] = None
    """For timm, torchvision and module: a file of weights; null or DEFAULT takes the published ones, and a module as
    its function returns it."""
    state_key: Optional[str] = None
    """Where in a checkpoint its weights are, if not in a usual place."""
    classes: Optional[list[Any]] = None
    """Where the classes of the weights are not the data's: positions of the data's classes, or the weights' names."""
    stages: Optional[dict[str, str]] = None
    """Own names of stages, each with the submodule that it ends with, in order; null finds them by the maps' sizes."""
    image_size: Optional[int] = field(default=None, metadata=COUNT)
    """Side in pixels to which images are brought first; null takes the library's own."""
    finetune: Optional[str] = field(default=None, metadata=one_of("head", "all"))
    """head or all: trains a new classifier, or everything, on the images of teachers.train_on; kept in the store."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """What differs from teachers.recipe."""

    @property
    def source(self) -> str:
        """Which of the ways to obtain it is given."""
        return next(name for name in _SOURCES if getattr(self, name))


_LIBRARY = ("options", "normalization", "weights", "state_key", "classes", "stages", "image_size", "finetune")
_USEFUL = {
    "zoo": (),
    "file": ("network", "key_map", "options", "normalization"),
    "train": ("options", "normalization", "seed", "recipe"),
    **dict.fromkeys(("timm", "torchvision", "module"), _LIBRARY),
    "hub": tuple(name for name in _LIBRARY if name != "weights"),
}
"""What counts beside each way to obtain a teacher; with `finetune`, `seed` and `recipe` do, too."""
_SOURCES = tuple(_USEFUL)


@dataclass
class TeacherSettings:
    """The pool of teachers and how its members are obtained."""

    pool: list[Any] = field(default_factory=list, metadata=COMPUTED)
    """Entries as mappings (see `TeacherEntry`) or as plain zoo ids."""
    count: Optional[int] = field(default=None, metadata=COMPUTED | COUNT_OR_NONE | beside("method.name"))
    """The first `count` members of the pool teach; null means all of them."""
    weights_dir: str = field(default="weights", metadata=LOCATION)
    """Folder of zoo files; missing ones are downloaded into it when `download` allows."""
    download: bool = field(default=True, metadata=LOCATION)
    train_on: str = field(default="subset", metadata=COMPUTED | one_of("subset", "all") | _TRAINED)
    """What teachers trained on demand may see: the same `subset` as the student, or `all` but those of `val/`."""
    recipe: RecipeSettings = field(default_factory=RecipeSettings, metadata=COMPUTED | _TRAINED)
    store: str = field(default="store", metadata=LOCATION)
    """Folder shared by all runs: trained teachers, what they say of test images, and teacher tables."""
    table: str = field(default="auto", metadata=ROUNDING | one_of("auto", "require", "off"))
    """Memo of teacher outputs: auto (use it when the augmentation is finite), require, or off."""
    table_stages: bool = field(default=False, metadata=ROUNDING | _TABLED)
    """Whether whole stage outputs are remembered too, for methods that read them: 2 bytes a value, so 8 kB a row for
    the last stage of a CIFAR ResNet and 88 kB for all four, where writing may take longer than asking the teachers.
    Otherwise such methods ask their teachers live. Averages over a small grid (a term's `grid`) are always kept."""
    table_budget_gb: float = field(default=20.0, metadata=ROUNDING | NOT_NEGATIVE | _TABLED)
    """Most disk that the tables of one run may need."""
    fill: str = field(default="none", metadata=FREE | one_of("none", "run", "all"))
    """What `ekd-teach` computes ahead: none, run (the rows that a run with these settings reads) or all views."""
    precision: str = field(default="auto", metadata=COMPUTED | one_of("auto", "float32", "bfloat16"))
    """What frozen teachers compute in: auto (bfloat16 where the hardware has it), float32 or bfloat16."""
    fold: bool = field(default=True, metadata=ROUNDING)
    """Whether batch norms are folded into convolutions."""
    compile: str = field(default="auto", metadata=ROUNDING | one_of(*_COMPILE))
    """Whether torch.compile is used: auto (when the work is long enough to pay for it), always or never."""

    def check(self) -> None:
        """Refuses impossible values.

        Raises:
            UserError: At the first value that is impossible or does not fit the pool.
        """
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

        Raises:
            UserError: If it has an unknown key, or not exactly one way to obtain it.
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
        useful = _USEFUL[given[0]] + (("seed", "recipe") if entry.finetune else ())
        for one in fields(TeacherEntry):
            if one.name not in (*given, *useful) and getattr(entry, one.name) != getattr(plain, one.name):
                raise UserError(f"{key}.{one.name} has no effect beside {given[0]} (what has: {', '.join(useful)})")
        if entry.finetune and entry.classes:
            raise UserError(f"{key}.classes has no effect beside finetune, which trains a new classifier")
        check_values(entry, f"{key}.")
        return entry


@dataclass
class StudentSettings:
    """The compact network and how it is branched."""

    network: str = field(default="resnet8", metadata=COMPUTED)
    options: dict[str, Any] = field(default_factory=dict, metadata=COMPUTED)
    branches: int = field(default=3, metadata=COMPUTED | {ALLOWED: Range(1, 1000)})
    split_after: str = field(default="stage1", metadata=COMPUTED | _BRANCHED)
    """Last stage that the branches share, or `none` for separate networks."""
    branch_width: Optional[float] = field(default=None, metadata=COMPUTED | POSITIVE | _BRANCHED)
    """Factor of the channels of the branches' own stages: 0.5 makes thin branches on a trunk of the usual width; null
    for branches as wide as the network. Of CIFAR ResNets."""
    ensemble: str = field(default="mean_logits", metadata=COMPUTED)
    reuse_classifier: bool = field(default=False, metadata=COMPUTED)
    """Whether every branch ends with a projector into its teacher's features and the teacher's own classifier, held
    fixed, instead of a head of its own (SimKD)."""
    normalization: Optional[str] = field(default=None, metadata=COMPUTED)
    """Named normalisation; null takes the data set's own."""
    compile: str = field(default="auto", metadata=ROUNDING | one_of(*_COMPILE))
    """Whether training steps go through torch.compile: auto (in long runs, where it pays), always or never."""


@dataclass
class ChainSettings:
    """How the assistants of `method.assistants` are trained."""

    recipe: dict[str, Any] = field(default_factory=dict)
    """What differs from the run's `recipe`: `+method.chain.recipe.epochs=240` on the command line."""
    temperature: Optional[float] = field(default=None, metadata=TEMPERATURE)
    """T; null takes the method's."""
    ce_weight: Optional[float] = None
    """1 - λ of the paper; null takes the weight of the method's ce_ensemble, see `assistants.link_terms`."""
    kd_weight: Optional[float] = None
    """λ of the paper, > 0; null takes the weight of the method's kd_ensemble, likewise."""


@dataclass
class MethodSettings:
    """A named list of weighted loss terms."""

    name: str = field(default="ekd", metadata=COMPUTED)
    temperature: Optional[float] = field(default=None, metadata=COMPUTED | TEMPERATURE)
    """T of all terms without their own; null means 4."""
    assignment: Any = field(default=None, metadata=COMPUTED)
    """one_to_one (null means this), mean, permuted, random, the teacher of each branch ([2, 0, 1] or "2,0,1", from 0),
    explicit rows [K, M], or {schedule: [[0, one_to_one], [0.8, permuted]]} of these by shares of the training."""
    teacher: Optional[str] = field(default=None, metadata=COMPUTED | one_of("best", "first", "mean"))
    """For methods that know one teacher: best (of the pool on the validation split), first, or mean (logits are
    averaged; losses of features, relations and the boundary are taken against each teacher, and averaged); null: all
    teachers teach, by the assignment."""
    assistants: Optional[list[Any]] = field(default=None, metadata=COMPUTED)
    """Networks between teachers and student, from large to small: names, or mappings with network, options and
    seed. Each is taught by the one before it, the student by the last alone; empty or null: no chain."""
    chain: ChainSettings = field(default_factory=ChainSettings, metadata=COMPUTED | beside("assistants"))
    terms: dict[str, Any] = field(default_factory=dict, metadata=COMPUTED)


@dataclass
class WandbSettings:
    """Weights & Biases; what is null is what its environment variables say."""

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
    """Where curves go beside metrics.csv, which is always written."""

    wandb: WandbSettings = field(default_factory=WandbSettings)
    tensorboard: bool = False


EVALUATION_PARTS = ("predictions", "generalisation", "flatness", "corruptions", "efficiency")
"""Parts of the evaluation of a trained student, in the order in which they are run."""


@dataclass
class EvaluationSettings:
    """What is found out about the trained student beside its test scores."""

    parts: list[str] = field(default_factory=lambda: ["predictions", "generalisation"])
    """Which parts follow the training; `ekd-evaluate` adds any to a finished run."""

    def check(self) -> None:
        """Refuses unknown parts.

        Raises:
            UserError: At the first one.
        """
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
    """Arguments of pytorch_lightning.Trainer; `precision: auto` is ours."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings, metadata=FREE)
    logger: LoggerSettings = field(default_factory=LoggerSettings, metadata=FREE)
    callbacks: dict[str, Any] = field(default_factory=dict, metadata=PART)
    """Additional Lightning callbacks, each a node with `_target_`."""
    seed: int = field(default=0, metadata=COMPUTED | SEED)
    channels_last: bool = field(default=True, metadata=ROUNDING)
    """Memory format of images and convolutions; changes the speed, not what is computed."""
    capture: str = field(default="auto", metadata=ROUNDING | one_of(*_COMPILE))
    """Whether whole training steps are recorded as CUDA graphs: auto (on one CUDA device, where nothing stands against
    it), always (on a processor too, where the same step runs unrecorded) or never. Changes the speed, not what is
    computed."""
    metric: str = field(default="val_accuracy", metadata=FREE | one_of(*RETURNABLE))
    """Field of result.json that a run returns to a sweeper."""
    tags: list[str] = field(default_factory=list, metadata=FREE)
    imports: list[str] = field(default_factory=list, metadata=ROUNDING)
    """Modules of your own, imported before names are looked up; the working directory is searched first."""
    resume: Optional[str] = field(default=None, metadata=FREE)
    """Directory of a stopped run to continue in place."""
    overwrite: bool = field(default=False, metadata=FREE)
    """Whether a finished run in the directory may be replaced, once all checks of the new one have passed."""

    def check(self) -> None:
        """Refuses what is impossible whatever the data.

        Raises:
            UserError: At the first impossible value.
        """
        check_values(self)
        check_name("method.name", self.method.name)
        self.recipe.check("recipe")
        self._check_unlabelled()
        self._check_length()
        self.teachers.check()
        self.evaluation.check()

    def _check_unlabelled(self) -> None:
        data, useless = self.data, "has no effect without data.unlabelled"
        if data.unlabelled is None:
            _require(data.unlabelled_share is None, "data.unlabelled_share", data.unlabelled_share, useless)
            _require(data.epoch == "labelled", "data.epoch", data.epoch, useless)
        elif mixed := self.recipe.mixed("recipe"):
            _require(False, "data.unlabelled", data.unlabelled, f"images without labels cannot be mixed ({mixed})")

    def _check_length(self) -> None:
        epochs, most = self.recipe.epochs, self.trainer.get("max_epochs")
        fits = most is None or (type(most) is int and 1 <= most <= epochs)
        allowed = f"recipe.epochs={epochs} is the length of the training; fewer stop it early, to be resumed"
        _require(fits, "trainer.max_epochs", most, allowed)
        least, last = self.trainer.get("min_epochs") or 0, most or epochs
        _require(least <= last, "trainer.min_epochs", least, f"the training has {last} epochs")
        least, last = self.trainer.get("min_steps") or 0, self.trainer.get("max_steps", -1)
        _require(last != 0, "trainer.max_steps", last, "leaves nothing to train; -1 sets no limit")
        _require(last == -1 or least <= last, "trainer.min_steps", least, f"is above trainer.max_steps={last}")


_PURPOSES = dict(purposes(Settings))
_CONDITIONS = tuple(conditions(Settings))
_PATHS: dict[str, tuple[str, ...]] = dict(paths(Settings))


def purpose_of(key: str) -> Purpose:
    """What a setting is for, by its dotted key; one that is not known counts as changing what is computed."""
    known = key
    while known not in _PURPOSES:
        if not known:
            return COMPUTED[PURPOSE]
        known = known.rpartition(".")[0]
    return _PURPOSES[known]


def without_effect(settings: Settings, given: Collection[str], facts: Mapping[str, object]) -> dict[str, str]:
    """What to say of given settings that count only beside values of others that these do not have.

    Args:
        settings: All of a run.
        given: Dotted keys; those that have their defaults are passed by.
        facts: What decides of some others instead of their values, by key.

    Returns:
        A line for each, by its key.
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
    """The dotted keys for which something holds, in the order of the settings."""
    return tuple(key for key in _PURPOSES if holds(key))


def is_location(key: str) -> bool:
    """Whether a setting says where things are."""
    return purpose_of(key).role is Role.LOCATION


def is_path(key: str) -> bool:
    """Whether a setting can be the path of a place, rather than whether something may be fetched."""
    return key in _PATHS


def is_place(key: str, value: object) -> bool:
    """Whether a value of a setting is the path of a place, whose content a run knows by its hash."""
    return isinstance(value, str) and key in _PATHS and value not in _PATHS[key]


def is_free(key: str, *, exact: bool = True) -> bool:
    """Whether a setting may change and the same be found: a location, or free.

    Args:
        key: Its dotted key.
        exact: Whether it must be the same to the last bit, and not but for rounding.
    """
    purpose = purpose_of(key)
    return is_location(key) or (purpose.role is Role.FREE and (purpose.exact or not exact))


def may_change_between_parts(key: str) -> bool:
    """Whether a setting may change when a stopped run continues."""
    return is_free(key) or purpose_of(key).between_parts
