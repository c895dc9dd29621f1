"""Staged networks and their registry, the branched student, the teacher ensemble, pretrained weights."""

# Importing the families registers them.
from ekd_lightning.networks import convnets, library  # noqa: F401
from ekd_lightning.networks.branches import cut_branches, fold_branches
from ekd_lightning.networks.convert import KEY_MAPS, load_foreign
from ekd_lightning.networks.deploy import DeployedStudent
from ekd_lightning.networks.deployed import DeployedModel, load_deployed
from ekd_lightning.networks.hub import find_student, push
from ekd_lightning.networks.library import allow_module
from ekd_lightning.networks.registry import build_network, network_names, register_network
from ekd_lightning.networks.staged import (
    NORMALIZATIONS,
    NetworkOutput,
    NetworkSpec,
    Normalization,
    StagedNetwork,
    StudentOutput,
    TeacherOutput,
    normalization,
)
from ekd_lightning.networks.student import ENSEMBLES, BranchedStudent
from ekd_lightning.networks.teachers import TeacherEnsemble, TeacherIdentity
from ekd_lightning.networks.weights import (
    load_network,
    load_student,
    read_foreign_checkpoint,
    read_metadata,
    read_spec,
    save_network,
    save_student,
    state_sha256,
)
from ekd_lightning.networks.zoo import ZooEntry, load_zoo_teacher, zoo_entry, zoo_ids

__all__ = [
    "ENSEMBLES",
    "KEY_MAPS",
    "NORMALIZATIONS",
    "BranchedStudent",
    "DeployedModel",
    "DeployedStudent",
    "NetworkOutput",
    "NetworkSpec",
    "Normalization",
    "StagedNetwork",
    "StudentOutput",
    "TeacherEnsemble",
    "TeacherIdentity",
    "TeacherOutput",
    "ZooEntry",
    "allow_module",
    "build_network",
    "cut_branches",
    "find_student",
    "fold_branches",
    "load_deployed",
    "load_foreign",
    "load_network",
    "load_student",
    "load_zoo_teacher",
    "network_names",
    "normalization",
    "push",
    "read_foreign_checkpoint",
    "read_metadata",
    "read_spec",
    "register_network",
    "save_network",
    "save_student",
    "state_sha256",
    "zoo_entry",
    "zoo_ids",
]
