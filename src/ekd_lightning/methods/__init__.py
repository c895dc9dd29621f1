"""Losses, terms and methods: what a student is trained to do."""

from ekd_lightning.methods import (  # importing them registers their terms
    boundary_terms,  # noqa: F401
    contrast_terms,  # noqa: F401
    feature_terms,  # noqa: F401
    logit_terms,  # noqa: F401
    losses,
    multi_teacher_terms,  # noqa: F401
    online_terms,  # noqa: F401
)
from ekd_lightning.methods.assignment import make_assignment
from ekd_lightning.methods.build import build_method, needs_teachers, terms_with_labels, uses_assignment
from ekd_lightning.methods.context import DEFAULT_TEMPERATURE, StepContext, TermContext
from ekd_lightning.methods.method import Method, MethodLoss
from ekd_lightning.methods.pair_terms import FeatureTerm, PairTerm
from ekd_lightning.methods.terms import SoftTerm, Term, build_term, register_term

__all__ = [
    "DEFAULT_TEMPERATURE",
    "FeatureTerm",
    "Method",
    "MethodLoss",
    "PairTerm",
    "SoftTerm",
    "StepContext",
    "Term",
    "TermContext",
    "build_method",
    "build_term",
    "losses",
    "make_assignment",
    "needs_teachers",
    "register_term",
    "terms_with_labels",
    "uses_assignment",
]
