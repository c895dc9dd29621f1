"""Staged networks and their registry, the branched student, the teacher ensemble, pretrained weights."""

from ekd_lightning.networks import resnet  # noqa: F401 (importing a family registers its networks)
from ekd_lightning.networks.outputs import NetworkOutput, StudentOutput, TeacherOutput
from ekd_lightning.networks.registry import NetworkSpec, build_network, network_names, register_network
from ekd_lightning.networks.staged import NORMALIZATIONS, Normalization, StagedNetwork, normalization
from ekd_lightning.networks.student import ENSEMBLES, BranchedStudent
from ekd_lightning.networks.teachers import TeacherEnsemble, TeacherIdentity
from ekd_lightning.networks.weights import (
    file_sha256,
    load_network,
    load_student,
    read_foreign_checkpoint,
    read_metadata,
    save_network,
    save_student,
    state_sha256,
)

__all__ = [
    "ENSEMBLES",
    "NORMALIZATIONS",
    "BranchedStudent",
    "NetworkOutput",
    "NetworkSpec",
    "Normalization",
    "StagedNetwork",
    "StudentOutput",
    "TeacherEnsemble",
    "TeacherIdentity",
    "TeacherOutput",
    "build_network",
    "file_sha256",
    "load_network",
    "load_student",
    "network_names",
    "normalization",
    "read_foreign_checkpoint",
    "read_metadata",
    "register_network",
    "save_network",
    "save_student",
    "state_sha256",
]
