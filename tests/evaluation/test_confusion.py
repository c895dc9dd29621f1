"""The confusion matrix against scikit-learn, also with classes that do not occur."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as reference
from sklearn.metrics import recall_score

from ekd_lightning.evaluation.confusion import class_accuracy, confusion_matrix


@pytest.mark.parametrize("missing", [None, 2])
def test_it_is_that_of_scikit_learn(missing):
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, 50), rng.integers(0, 4, 50)
    if missing is not None:
        labels[labels == missing] = 0
    found = confusion_matrix(torch.from_numpy(predicted), torch.from_numpy(labels), 4)
    np.testing.assert_array_equal(found, reference(labels, predicted, labels=range(4)))
    recalls = recall_score(labels, predicted, labels=range(4), average=None, zero_division=np.nan)
    for c, accuracy in enumerate(class_accuracy(found)):
        assert accuracy is None if c == missing else accuracy == pytest.approx(recalls[c])
