"""Losses, terms and methods: what a student is trained to do."""

from ekd_lightning.methods import (  # importing them registers their terms
    attention_terms,
    boundary_terms,
    contrast_terms,
    feature_terms,
    flow_terms,
    logit_terms,
    logit_variants,
    multi_teacher_terms,
    online_terms,
    relation_terms,
    vid_terms,
)
from ekd_lightning.methods.assignment import (
    Assignment,
    AssignmentSpec,
    FixedAssignment,
    RandomAssignment,
    build_assignment,
    make_assignment,
)
from ekd_lightning.methods.build import build_method, needs_teachers, uses_assignment
from ekd_lightning.methods.losses import ambiguity, combine_teachers, cross_entropy, kd_divergence, mse
from ekd_lightning.methods.method import Method, MethodLoss
from ekd_lightning.methods.terms import (
    StepContext,
    Term,
    TermContext,
    build_term,
    register_term,
    term_names,
)

__all__ = [
    "Assignment",
    "AssignmentSpec",
    "FixedAssignment",
    "Method",
    "MethodLoss",
    "RandomAssignment",
    "StepContext",
    "Term",
    "TermContext",
    "ambiguity",
    "attention_terms",
    "boundary_terms",
    "build_assignment",
    "build_method",
    "build_term",
    "combine_teachers",
    "contrast_terms",
    "cross_entropy",
    "feature_terms",
    "flow_terms",
    "kd_divergence",
    "logit_terms",
    "logit_variants",
    "make_assignment",
    "mse",
    "multi_teacher_terms",
    "needs_teachers",
    "online_terms",
    "register_term",
    "relation_terms",
    "term_names",
    "uses_assignment",
    "vid_terms",
]
