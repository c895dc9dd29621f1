"""What a part of the evaluation of a finished run is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from ekd_lightning.data import Dataset, Subset
from ekd_lightning.evaluation.predict import StudentPredictions, predict_student
from ekd_lightning.networks import BranchedStudent, TeacherEnsemble
from ekd_lightning.runs.result import Result
from ekd_lightning.settings import Settings


class Findings(NamedTuple):
    """What a part found.

    Attributes:
        fields: Numbers, strings, and lists or mappings of them, for result.json; names are unique over all parts.
        arrays: What plots need and no table shows, for the run's arrays file; names likewise.
    """

    fields: dict[str, Any]
    arrays: Mapping[str, np.ndarray] = MappingProxyType({})


@dataclass
class EvaluationContext:
    """A trained student, the data it was made for, and its teachers.

    Attributes:
        settings: The run's.
        result: What is recorded of the run so far (`num_branches`, `assignment`, ...).
        student: In eval mode, on `device`.
        dataset: Training and test images, all of them.
        subset: Which training images the run saw (`train_index`) and validated on (`val_index`).
        device: Where to compute.
        gather: Loads the run's teachers; None if it had none.
    """

    settings: Settings
    result: Result
    student: BranchedStudent
    dataset: Dataset
    subset: Subset
    device: torch.device
    gather: Callable[[], TeacherEnsemble] | None = field(default=None, repr=False)

    @cached_property
    def teachers(self) -> TeacherEnsemble | None:
        """The run's teachers on `device`, loaded when first asked for; None if it had none."""
        return None if self.gather is None else self.gather().to(self.device)

    @cached_property
    def test_predictions(self) -> StudentPredictions:
        """What the student says of the test images; several parts read it, so it is asked once."""
        batch_size = self.settings.data.eval_batch_size
        return predict_student(self.student, self.dataset.test, batch_size=batch_size, device=self.device)


Part = Callable[[EvaluationContext], Findings]
"""One part of an evaluation. It leaves student and teachers as they were."""
