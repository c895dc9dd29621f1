"""Typed settings of a run, into which a command turns the configuration.

This module checks what needs no heavy import. Names in a registry (data set, network, method term) are checked by the
registry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from ekd_lightning.errors import unknown_name
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
    ROUNDING,
    SEED,
    SHARE,
    TEMPERATURE,
    WHEN,
    WORDS,
    Range,
    beside,
    check_name,
    check_that,
    check_values,
    one_of,
)
from ekd_lightning.training_settings import RecipeSettings as RecipeSettings
from ekd_lightning.training_settings import TeacherEntry as TeacherEntry
from ekd_lightning.training_settings import TeacherSettings as TeacherSettings

# `Optional[X]` and not `X | None`: OmegaConf reads these annotations as a schema.

_FROM_MINUS_ONE = {ALLOWED: Range(-1, LARGEST)}
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
    compile: str = field(default="auto", metadata=ROUNDING | WHEN)
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
    *("test_accuracy", "test_accuracy_best", "test_accuracy_last", "test_accuracy_ema"),
    *("test_nll", "test_ece", "test_brier", "val_accuracy", "val_accuracy_best"),
    *("num_parameters", "macs", "train_seconds", "images_per_second"),
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
    capture: str = field(default="auto", metadata=ROUNDING | WHEN)
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
            check_that(data.unlabelled_share is None, "data.unlabelled_share", data.unlabelled_share, without)
            check_that(data.epoch == "labelled", "data.epoch", data.epoch, without)
        elif mixed := self.recipe.mixed("recipe"):
            check_that(False, "data.unlabelled", data.unlabelled, f"images without labels cannot be mixed ({mixed})")

    def _check_length(self) -> None:
        epochs, most = self.recipe.epochs, self.trainer.get("max_epochs")
        fits = most is None or (type(most) is int and 1 <= most <= epochs)
        allowed = f"must be from 1 to recipe.epochs={epochs}; fewer epochs stop the training early, to be resumed"
        check_that(fits, "trainer.max_epochs", most, allowed)
        least, last = self.trainer.get("min_epochs") or 0, most or epochs
        check_that(least <= last, "trainer.min_epochs", least, f"must be at most {last}, the epochs of the training")
        least, last = self.trainer.get("min_steps") or 0, self.trainer.get("max_steps", -1)
        check_that(last != 0, "trainer.max_steps", last, "leaves nothing to train; -1 sets no limit")
        check_that(last == -1 or least <= last, "trainer.min_steps", least, f"is above trainer.max_steps={last}")
