"""Staged networks and their registry, the branched student, the teacher ensemble, pretrained weights."""

# Importing the families registers them.
from ekd_lightning.networks import convnets, library  # noqa: F401
from ekd_lightning.networks.branches import cut_branches, fold_branches
from ekd_lightning.networks.deployed import DeployedModel
from ekd_lightning.networks.registry import build_network, register_network
from ekd_lightning.networks.spec import NetworkSpec, normalization
from ekd_lightning.networks.staged import StagedNetwork, StudentOutput, TeacherOutput
from ekd_lightning.networks.student import BranchedStudent
from ekd_lightning.networks.teachers import TeacherEnsemble, TeacherIdentity
from ekd_lightning.networks.weights import load_network, load_student, save_network, save_student, state_sha256

__all__ = [
    "BranchedStudent",
    "DeployedModel",
    "NetworkSpec",
    "StagedNetwork",
    "StudentOutput",
    "TeacherEnsemble",
    "TeacherIdentity",
    "TeacherOutput",
    "build_network",
    "cut_branches",
    "fold_branches",
    "load_network",
    "load_student",
    "normalization",
    "register_network",
    "save_network",
    "save_student",
    "state_sha256",
]
