"""Estimates over runs: a mean with its spread and 95 % interval, differences paired by seed, and both in words."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

SIGNIFICANCE = 0.05
"""Level of significance of corrected p values; intervals cover 1 minus this, 95 %."""
ENOUGH = 3
"""Least number of runs, or of pairs of runs, for an interval and a test."""
TOO_FEW = "too few runs"
NONE = "–"
"""Cell of a table without a value."""
_EQUAL = 1e-6
"""Differences of accuracies below this are rounding, because accuracies are recorded in float32."""
NO_LIMITS = (-math.inf, math.inf)
SHARE = (0.0, 1.0)
"""Limits of a value: none, and those of accuracies and other shares."""
_LIMITS = {
    "gap_nll": NO_LIMITS,
    "gap|gain|margin|q_statistic|error_correlation": (-1.0, 1.0),
    "accuracy|agreement|disagreement|ece|mce|overconfidence|double_fault|hit_rate|cka|branch_variance": SHARE,
    "brier": (0.0, 2.0),
    "js": (0.0, math.log(2)),
    "nll|kl|ambiguity|mutual_information|temperature": (0.0, math.inf),
    "seconds|ms|throughput|memory|bytes|macs|parameters|images|steps|epochs": (0.0, math.inf),
}
"""Limits of the figures whose name has one of these words; the first that fits."""
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Estimate:
    """A mean over runs.

    Attributes:
        mean: Arithmetic mean.
        std: Sample standard deviation (n - 1); None for a single run.
        n: Number of runs.
        limits: Smallest and largest possible value; intervals are cut there.
    """

    mean: float
    std: float | None
    n: int
    limits: tuple[float, float] = NO_LIMITS

    @property
    def half(self) -> float | None:
        """Half the width of Student's 95 % interval, in the unit of the mean; None below `ENOUGH` runs."""
        if self.std is None or self.n < ENOUGH:
            return None
        return _quantile(self.n - 1) * self.std / math.sqrt(self.n)

    @property
    def low(self) -> float:
        """Lower end of the interval; the mean itself without one."""
        return max(self.limits[0], self.mean - (self.half or 0.0))

    @property
    def high(self) -> float:
        """Upper end of the interval; the mean itself without one."""
        return min(self.limits[1], self.mean + (self.half or 0.0))


@dataclass(frozen=True)
class Difference(Estimate):
    """One minus another, paired by seed: differences of accuracies in [0, 1].

    Attributes:
        p: Two-sided p value of the paired t-test; None below `ENOUGH` pairs, or if all differences are the same number
            other than 0, so that there is no spread to compare it with.
        p_holm: p, corrected by Holm's method for a number of comparisons; None if it is not corrected.
    """

    p: float | None = None
    p_holm: float | None = None

    @property
    def tested(self) -> float | None:
        """The corrected p value, or p if it was not corrected."""
        return self.p if self.p_holm is None else self.p_holm


@cache
def _quantile(freedom: int) -> float:
    """Quantile of Student's t; cached, because scipy needs more time for it than the rest of a report."""
    from scipy import stats  # noqa: PLC0415 (slow)

    return float(stats.t.ppf(1 - SIGNIFICANCE / 2, freedom))


@cache
def limits_of(name: str) -> tuple[float, float]:
    """Smallest and largest possible value of a field of the results or a column of metrics.csv, e.g. `test_nll`."""
    fits = (limits for words, limits in _LIMITS.items() if re.search(f"(^|[_/])({words})([_/]|$)", name))
    return next(fits, NO_LIMITS)


def estimate(values: Iterable[float], limits: tuple[float, float] = NO_LIMITS) -> Estimate | None:
    """Mean, spread and number of finite values, one per run; None without any."""
    numbers = [float(value) for value in values if math.isfinite(value)]
    if not numbers:
        return None
    spread = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Estimate(statistics.fmean(numbers), spread, len(numbers), limits)


def paired(differences: Sequence[float]) -> Difference:
    """Student's t interval and two-sided paired t-test (Student 1908) of differences, one per seed.

    Raises:
        ValueError: Without differences.
    """
    found = estimate(differences)
    if found is None:
        raise ValueError("no differences")
    difference = Difference(found.mean, found.std, found.n, (-1.0, 1.0))
    if found.half is None:
        return difference
    if max(differences) - min(differences) < _EQUAL:  # no spread: the statistic is 0 / 0 or infinite
        return replace(difference, p=1.0 if abs(found.mean) < _EQUAL else None)
    from scipy import stats  # noqa: PLC0415 (slow)

    return replace(difference, p=float(stats.ttest_1samp(differences, 0.0).pvalue))


def minus(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """The paired difference of two figures by seed over their common seeds; None without a common seed."""
    common = sorted(ours.keys() & theirs.keys())
    return paired([ours[seed] - theirs[seed] for seed in common]) if common else None


def corrected(found: Mapping[Name, Difference | None]) -> dict[Name, Difference]:
    """The differences that are not None, their p values corrected by Holm's method for the number of tested ones."""
    # A difference that is equal in all pairs counts as tested: its statistic is infinite, so it ranks first.
    tested = {name: one.p or 0.0 for name, one in found.items() if one is not None and one.half is not None}
    p_holm = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {
        name: replace(one, p_holm=None if one.p is None else p_holm[name])
        for name, one in found.items()
        if one is not None
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p values for their number by the step-down method of Holm (1979).

    The i-th smallest of m (from 0) is multiplied by m - i, made at least as large as the corrected ones before
    it, and cut at 1.

    Args:
        p_values: In [0, 1], any number of them.

    Returns:
        The corrected values, in the order of `p_values`.
    """
    raised = [0.0] * len(p_values)
    largest = 0.0
    for rank, position in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        raised[position] = largest
    return raised


def share(value: float) -> str:
    """A share as percent, e.g. `71.55`."""
    return f"{100 * value:.2f}"


def points(value: float) -> str:
    """A difference of shares as points with its sign, e.g. `+5.43`."""
    return f"{100 * value:+.2f}".replace("-", "−")


def plural(count: int, word: str) -> str:
    """A count and its noun, e.g. `1 pair`, `3 pairs`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def listed(words: Sequence[str]) -> str:
    """E.g. `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def percent(value: Estimate | None) -> str:
    """A share as percent with its spread, e.g. `78.02 ± 0.31`."""
    if value is None:
        return NONE
    return share(value.mean) + ("" if value.std is None else f" ± {share(value.std)}")


def interval(value: Estimate | None, words: Callable[[float], str]) -> str:
    """The ends of an interval, e.g. `[70.83, 72.27]`; `(too few runs)` without one, nothing without a value."""
    if value is None:
        return ""
    return f"({TOO_FEW})" if value.half is None else f"[{words(value.low)}, {words(value.high)}]"


def accuracy_text(value: Estimate | None) -> str:
    """Mean, spread and interval in percent, e.g. `71.55 ± 0.29 [70.83, 72.27]`."""
    return NONE if value is None else f"{percent(value)} {interval(value, share)}"


def p_text(value: float) -> str:
    """E.g. `p 0.012`, `p < 0.001`."""
    return "p < 0.001" if value < 0.001 else f"p {value:.3f}"


def interval_text(value: Difference | None) -> str:
    """Points with the interval, e.g. `+5.43 [+4.10, +6.76]`."""
    return NONE if value is None else f"{_ascii(value.mean)} {interval(value, _ascii)}"


def _ascii(value: float) -> str:
    """Points with a hyphen for the minus, as Markdown and CSV have it."""
    return f"{100 * value:+.2f}"


def interval_words(value: Estimate, words: Callable[[float], str] = points) -> str:
    """The interval in a sentence, e.g. `95 % interval +4.10 to +6.76`, each end in `words`."""
    if value.half is None:
        return f"{TOO_FEW} for an interval"
    return f"95 % interval {words(value.low)} to {words(value.high)}"


def difference_text(value: Difference | None) -> str:
    """Points with the interval, n and the corrected p, e.g. `+5.43 [+4.10, +6.76], n 3, p 0.012`."""
    if value is None or value.half is None:
        return interval_text(value)
    if value.tested is None:  # the same difference in every pair
        return f"{100 * value.mean:+.2f} (n {value.n}, no spread)"
    return f"{interval_text(value)}, n {value.n}, {p_text(value.tested)}"
