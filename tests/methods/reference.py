"""EKD written a second time, with loops over single numbers, from the formulas alone. float64 NumPy only."""

from __future__ import annotations

import numpy as np


def softmax(z, temperature=1.0):
    e = [np.exp((v - max(z)) / temperature) for v in z]
    return [v / sum(e) for v in e]


def ce(logits, labels):
    return np.mean([-np.log(softmax(row)[y]) for row, y in zip(logits, labels, strict=True)])


def kl(p, q):
    return sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True))


def kd(student, teacher_probs, temperature):
    rows = [kl(p, softmax(s, temperature)) for s, p in zip(student, teacher_probs, strict=True)]
    return temperature**2 * np.mean(rows)


def target(teachers_MBC, weights_M, temperature, combine):
    """Probabilities [B][C] of the combined teachers at the temperature."""
    M, B, C = teachers_MBC.shape
    rows = []
    for b in range(B):
        if combine == "logits":
            mean = [sum(weights_M[m] * teachers_MBC[m, b, c] for m in range(M)) for c in range(C)]
            rows.append(softmax(mean, temperature))
        else:
            probs = [softmax(teachers_MBC[m, b], temperature) for m in range(M)]
            rows.append([sum(weights_M[m] * probs[m][c] for m in range(M)) for c in range(C)])
    return rows


def ekd(
    *, ensemble, branches, teachers, labels, student_pooled, teacher_pooled, assignment, temperature, combine, weights
):
    """All five terms and their weighted sum; features of equal size, so no adapter."""
    K, M = assignment.shape
    terms = {
        "ce_ensemble": ce(ensemble, labels),
        "ce_branch": sum(ce(branches[k], labels) for k in range(K)) / K,
        "kd_ensemble": kd(ensemble, target(teachers, [1 / M] * M, temperature, combine), temperature),
        "kd_branch": sum(
            kd(branches[k], target(teachers, assignment[k], temperature, combine), temperature) for k in range(K)
        )
        / K,
        "feature_branch": sum(
            assignment[k, m] * np.mean((student_pooled[k] - teacher_pooled[m]) ** 2) for k in range(K) for m in range(M)
        )
        / K,
    }
    return terms, sum(weights[name] * value for name, value in terms.items())
