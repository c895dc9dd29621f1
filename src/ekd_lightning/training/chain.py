"""Chain of teacher assistants, teacher → assistant → ... → student, planned and checked before any training.

Mirzadeh et al. 2020 (AAAI, arXiv 1902.03393): each network of the chain is trained by plain distillation from the one
before it, L = (1 - λ) CE + λ T² KL (their equation 3; KL is the batch mean).

The run's teachers teach the first assistant (by the mean of their logits if there are several); the last assistant
alone teaches the student, by the run's method.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ekd_lightning.data import Dataset, Subset, ViewFamily
from ekd_lightning.data.loader import check_batch_size
from ekd_lightning.errors import UserError, unknown_name
from ekd_lightning.evaluation.efficiency import count_parameters
from ekd_lightning.methods.options import number, temperature_of
from ekd_lightning.networks import (
    NetworkSpec,
    StagedNetwork,
    TeacherEnsemble,
    TeacherIdentity,
    build_network,
    load_network,
    normalization,
    state_sha256,
)
from ekd_lightning.settings import Settings
from ekd_lightning.teachers.plan import PlannedTeacher, plan_source
from ekd_lightning.teachers.store import TeacherStore
from ekd_lightning.tracking.loggers import TeacherCurves
from ekd_lightning.training.pool import check_teachers, gather_teachers
from ekd_lightning.training.steps import check_optimizer
from ekd_lightning.training.teacher_training import LinkTraining, link_method, train_assistant

DEFAULT_CE_WEIGHT, DEFAULT_KD_WEIGHT = 0.1, 0.9
"""Weights of a link's terms if the method has no kd_ensemble to take them from."""
_ENTRY = ("network", "options", "seed")


@dataclass(frozen=True)
class Assistant:
    """An assistant of the chain, checked but not trained yet."""

    id: str
    spec: NetworkSpec
    seed: int
    num_parameters: int


@dataclass(frozen=True)
class Chain:
    """A chain: the teachers at its start, the assistants from the first to the last, and their common settings."""

    origins: tuple[PlannedTeacher, ...]
    assistants: tuple[Assistant, ...]
    training: LinkTraining

    def taught_by(self, origins: list[PlannedTeacher]) -> Chain:
        """Returns the chain with other teachers at its start."""
        return replace(self, origins=tuple(origins))

    def last(self) -> PlannedTeacher:
        """Returns the plan of the student's teacher; to obtain it trains all assistants that the store lacks."""
        last = self.assistants[-1]
        obtain, is_ready = partial(_obtain, self), partial(_is_ready, self)
        return PlannedTeacher(last.id, last.spec, "assistant", obtain, is_ready=is_ready)


def plan_chain(
    settings: Settings,
    dataset: Dataset,
    subset: Subset,
    views: ViewFamily,
    teachers: list[PlannedTeacher],
    student: torch.nn.Module,
    accelerator: str,
    curves: TeacherCurves | None = None,
) -> Chain:
    """Parses `method.assistants`, and checks everything that can be checked before training.

    `teachers` are candidates for teaching the first assistant; of the student only its size is used.

    Raises:
        UserError: If the method has no teachers, a network or option is unknown, or a recipe, temperature or weight is
            impossible.
    """
    method = settings.method
    if not teachers:
        raise UserError(f"method.assistants={method.assistants}: the method {method.name!r} needs no teachers")
    assistants = tuple(_assistants(settings, dataset))
    _warn_of_sizes(assistants, teachers, count_parameters(student), settings.student.network)
    recipe, temperature = settings.recipe.changed(method.chain.recipe, "method.chain.recipe"), method.chain.temperature
    check_optimizer(recipe, "method.chain.recipe")
    check_batch_size(recipe.batch_size, len(subset.train_index), recipe_key="method.chain.recipe")
    training = LinkTraining(
        replace(settings, recipe=recipe),
        dataset,
        subset,
        views,
        terms=link_terms(settings),
        temperature=method.temperature
        if temperature is None
        else temperature_of("method.chain.temperature", temperature),
        accelerator=accelerator,
        curves=curves,
    )
    origins = teachers[:1] if method.teacher == "best" else teachers
    taught_by = [*origins, *(PlannedTeacher(a.id, a.spec, "assistant", _not_obtained) for a in assistants[:-1])]
    known = {"unknown_classes": [one.unknown for one in origins], "teacher_names": [one.id for one in origins]}
    source = plan_source(
        training.settings, dataset, subset, views, taught_by, link_method(training, len(origins), seed=0, **known)
    )
    return Chain(tuple(teachers), assistants, replace(training, source=source))


def link_terms(settings: Settings) -> dict[str, dict[str, Any]]:
    """Returns the two terms of every link: ce_ensemble and kd_ensemble of the method, if it has them.

    They keep their options (label smoothing, how teachers are combined). If the method has no kd_ensemble, or gives it
    no weight, the weights 1 - λ and λ are 0.1 and 0.9. `method.chain` overrides both.

    Raises:
        UserError: If ce_weight is negative, or kd_weight not positive.
    """
    chain = settings.method.chain
    ce, kd = (_term(settings.method.terms, kind) for kind in ("ce_ensemble", "kd_ensemble"))
    if not kd.get("weight"):
        ce, kd = {"weight": DEFAULT_CE_WEIGHT}, {"weight": DEFAULT_KD_WEIGHT}
    if chain.temperature is not None:
        kd.pop("temperature", None)
    if chain.ce_weight is not None:
        ce["weight"] = number("method.chain.ce_weight", chain.ce_weight, low=0.0)
    if chain.kd_weight is not None:
        kd["weight"] = number("method.chain.kd_weight", chain.kd_weight, above=0.0)
    terms = {"ce_ensemble": {"weight": 0.0, **ce}, "kd_ensemble": kd}
    return {name: {**term, "weight": float(term["weight"])} for name, term in terms.items()}


def _term(terms: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Returns options and weight of the first term of a type; empty without such a term."""
    found = (term for name, term in terms.items() if (term.get("type") or name) == kind)
    return {name: value for name, value in next(found, {}).items() if name != "type"}


def _assistants(settings: Settings, dataset: Dataset) -> list[Assistant]:
    assistants = []
    for position, node in enumerate(settings.method.assistants or []):
        key = f"method.assistants[{position}]"
        entry = {"network": node} if isinstance(node, str) else node
        if not isinstance(entry, dict) or not entry.get("network"):
            raise UserError(f"{key}={node}: must be the name of a network, or a mapping of network, options and seed")
        for name in entry:
            if name not in _ENTRY:
                raise unknown_name(f"key of {key}", name, _ENTRY)
        options = entry.get("options") or {}
        if not isinstance(options, dict):
            raise UserError(f"{key}.options={options!r}: must be a mapping")
        seed = settings.seed if entry.get("seed") is None else entry["seed"]
        if type(seed) is not int or not 0 <= seed < 2**64:
            raise UserError(f"{key}.seed={seed!r}: must be an integer in [0, 2**64)")
        statistics = normalization(dataset.normalization)
        try:
            spec = NetworkSpec(str(entry["network"]), dataset.num_classes, statistics, options)
            size = _size(spec)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        assistants.append(Assistant(f"{spec.name}-s{seed}-assistant", spec, seed, size))
    return assistants


def _size(spec: NetworkSpec) -> int:
    with torch.random.fork_rng(devices=[]):  # keeps the run's generator where it is
        return count_parameters(build_network(spec))


def _warn_of_sizes(
    assistants: tuple[Assistant, ...], teachers: list[PlannedTeacher], student: int, student_name: str
) -> None:
    """Warns if the number of parameters does not fall along the chain, from teacher to student."""
    sizes = {plan.id: _size(plan.spec) for plan in teachers}
    above, above_size = max(sizes.items(), key=lambda item: item[1])
    for position, assistant in enumerate(assistants):
        name, size = f"method.assistants[{position}]={assistant.spec.name}", assistant.num_parameters
        if size > above_size:
            warnings.warn(f"{name} has {size:,} parameters, more than {above} before it ({above_size:,})", stacklevel=4)
        if size < student:
            warnings.warn(
                f"{name} has {size:,} parameters, fewer than the student {student_name} ({student:,})", stacklevel=4
            )
        above, above_size = assistant.spec.name, size


def _not_obtained() -> tuple[StagedNetwork, dict[str, Any]]:
    raise AssertionError("this plan only describes the size of an assistant")


def _is_ready(chain: Chain) -> bool:
    """Whether the store has all assistants; raises if one is missing and cannot be stored, or a teacher is faulty."""
    store, hashes = TeacherStore(Path(chain.training.settings.teachers.store)), check_teachers(chain.origins)
    for assistant in chain.assistants:
        # The key is unknown while its teachers are to be trained, but then the assistant is to be trained, too.
        key = chain.training.key(assistant.spec, assistant.seed, [str(sha256) for sha256 in hashes])
        if not store.has(key):
            return False
        hashes = [state_sha256(load_network(store.path(key)))]
    return True


def _obtain(chain: Chain) -> tuple[StagedNetwork, dict[str, Any]]:
    """Returns the last assistant and its details; assistants come from the store, or are trained in turn."""
    teachers = gather_teachers(list(chain.origins))
    links = []
    for assistant in chain.assistants:
        network, link = _obtain_link(chain.training, assistant, teachers)
        links.append(link)
        identity = TeacherIdentity(assistant.id, link["sha256"], "assistant", assistant.spec.name)
        teachers = TeacherEnsemble([network], [identity])
    last = links[-1]
    return network, {"trained_on": "subset", "seed": last["seed"], "store_key": last["store_key"], "chain": links}


def _obtain_link(
    training: LinkTraining, assistant: Assistant, teachers: TeacherEnsemble
) -> tuple[StagedNetwork, dict[str, Any]]:
    """Returns an assistant and its record."""
    store = TeacherStore(Path(training.settings.teachers.store))
    hashes = [identity.sha256 for identity in teachers.identities]
    key = training.key(assistant.spec, assistant.seed, hashes)
    found = store.path(key).is_file()
    # All processes of a distributed run do this: the first one trains under the lock, the others wait and read.
    network = store.get_or_train(
        key, lambda scratch: train_assistant(training, assistant.spec, assistant.seed, teachers, scratch)
    )
    cost = store.cost(key)
    return network, {
        "id": assistant.id,
        "network": assistant.spec.name,
        "sha256": state_sha256(network),
        "teachers": [identity.id for identity in teachers.identities],
        "teachers_sha256": hashes,
        "num_parameters": assistant.num_parameters,
        "seed": assistant.seed,
        "store_key": store.digest(key),
        "found": found,
        "train_seconds": cost.get("train_seconds"),
        "steps": cost.get("steps"),
    }
