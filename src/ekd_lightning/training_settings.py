"""Typed settings of what is trained: the recipe, and the teachers with how each is obtained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Optional

from ekd_lightning.errors import UserError
from ekd_lightning.roles import (
    ALLOWED,
    COMPUTED,
    COUNT,
    COUNT_OR_NONE,
    FREE,
    LOCATION,
    NOT_NEGATIVE,
    POSITIVE,
    PROTOCOL,
    ROUNDING,
    SEED,
    WHEN,
    Range,
    beside,
    check_fields,
    check_that,
    check_values,
    one_of,
)

# `Optional[X]` and not `X | None`: OmegaConf reads these annotations as a schema.

_SGD = beside("optimizer", lambda name: name.lower() == "sgd")
_STEPS = beside("schedule", lambda name: name == "step")
_TRAINED = beside(
    "pool", lambda pool: any(isinstance(one, dict) and (one.get("train") or one.get("finetune")) for one in pool)
)
_TABLED = beside("table", lambda use: use != "off")


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
        check_that(not self.nesterov or self.momentum > 0, f"{prefix}.nesterov", True, f"needs {prefix}.momentum > 0")
        inside = all(0 < m < 1 for m in self.milestones)
        check_that(inside, f"{prefix}.milestones", self.milestones, "must be shares of the training in (0, 1)")
        fits = self.warmup_epochs < self.epochs
        check_that(fits, f"{prefix}.warmup_epochs", self.warmup_epochs, f"must be below {prefix}.epochs={self.epochs}")

    def changed(self, changes: dict[str, Any], key: str) -> RecipeSettings:
        """This recipe with other values for some settings; messages name their keys below `key`.

        Raises:
            UserError: For an unknown setting, or a value of another type or outside its range.
        """
        check_fields(key, changes, RecipeSettings)
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
    compile: str = field(default="auto", metadata=ROUNDING | WHEN)
    """Whether frozen teachers use torch.compile: auto (if the work is long enough to pay for it), always or never."""

    def check(self) -> None:
        """Refuses impossible values, and values that do not fit the pool, by a `UserError`."""
        pool = len(self.pool)
        check_values(self, "teachers.")
        if self.count is not None:
            check_that(self.count <= pool, "teachers.count", self.count, f"the pool has only {pool} teachers")
        for position in range(pool):
            self.entry(position)
        self.recipe.check("teachers.recipe")
        check_that(
            not self.recipe.ema, "teachers.recipe.ema", self.recipe.ema, "only the student's weights are averaged"
        )

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
            check_fields(key, node, TeacherEntry)
            entry = TeacherEntry(**node)
        else:
            raise UserError(f"{key}={node}: must be a zoo id or a mapping with one of {', '.join(_SOURCES)}")
        given = [name for name in _SOURCES if getattr(entry, name)]
        check_that(len(given) == 1, key, given, f"give exactly one of {', '.join(_SOURCES)}")
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
