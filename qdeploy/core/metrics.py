"""Rates with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Int32, Int64

Z95 = NormalDist().inv_cdf(0.975)
EARLY = 0.001  # error allowed to a decision that is taken before everything was asked
Z_EARLY = NormalDist().inv_cdf(1 - EARLY / 2)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured value in percent or percentage points, with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    samples: int

    def wider(
        self, points: float, samples: int, ends: tuple[float, float] = (-math.inf, math.inf)
    ) -> Estimate:
        """The same on fewer samples, and by what the others may be off."""
        low, high = max(self.low - points, ends[0]), min(self.high + points, ends[1])
        return replace(self, low=low, high=high, samples=samples)


def rate(hits: Bool[np.ndarray, " samples"], z: float = Z95) -> Estimate:
    """Share of true values in percent, with Wilson's score interval.

    Wilson, "Probable inference", JASA 1927: unlike the textbook interval it stays inside
    [0, 100] and does not shrink to a point at 0 or 100.

    Args:
        z: Half-width of the interval in standard errors.
    """
    n = hits.size
    if n == 0:
        return Estimate(math.nan, 0.0, 100.0, 0)
    p = float(np.count_nonzero(hits)) / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return Estimate(100 * p, 100 * max(centre - half, 0.0), 100 * min(centre + half, 1.0), n)


def unseen_at_most(found: int, drawn: int, left: int) -> int:
    """How many of `left` samples may be hits where `found` of `drawn` ones are.

    The upper end of Clopper and Pearson's interval (Biometrika 1934) for the share among all, less
    what was found. It errs once in a thousand times, so that it may be asked for after a few looks
    and the last word still be one of 95 % (Haybittle and Peto's rule); and less often than that,
    since the samples are drawn without replacement.
    """
    if left == 0 or found == drawn:
        return left
    counts = np.arange(found + 1)
    ways = np.array([_log_binomial(drawn, int(k)) for k in counts])
    low, high = found / drawn, 1.0
    for _ in range(40):
        share = (low + high) / 2
        terms = ways + counts * np.log(share) + (drawn - counts) * np.log1p(-share)
        low, high = (share, high) if np.exp(terms).sum() > EARLY else (low, share)
    return min(left, math.ceil(high * (drawn + left) - found))


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def images_for(percent: float, points: float) -> int:
    """How many images a rate near `percent` takes to be known to within `points`, 95 %."""
    share, half = percent / 100, points / 100
    return math.ceil(Z95**2 * max(share * (1 - share), half / 2) / half**2)


def paired_difference(
    first: Bool[np.ndarray, " samples"], second: Bool[np.ndarray, " samples"], z: float = Z95
) -> Estimate:
    """Share of `first` minus share of `second` on the same samples, in percentage points.

    The interval is that of the mean of the paired differences (each -1, 0 or 1), which is much
    narrower than that of two independent rates, because both models see the same images. Two
    pseudo-observations, one of each sign, keep it open when the models never differ (Agresti and
    Min, Statistics in Medicine 2005).

    Args:
        z: Half-width of the interval in standard errors.
    """
    n = first.size
    if n == 0:
        return Estimate(math.nan, -100.0, 100.0, 0)
    difference = first.astype(np.int8) - second.astype(np.int8)
    mean = float(difference.mean())
    plus, minus = (difference > 0).sum() + 1, (difference < 0).sum() + 1
    adjusted = (plus - minus) / (n + 2)
    half = z * math.sqrt(((plus + minus) / (n + 2) - adjusted**2) / (n + 2))
    return Estimate(100 * mean, 100 * max(mean - half, -1.0), 100 * min(mean + half, 1.0), n)


def relative_difference(
    first: Bool[np.ndarray, " samples"], second: Bool[np.ndarray, " samples"]
) -> Estimate:
    """What `second` has less than `first`, in percent of `first`, on the same samples.

    The interval is that of a ratio of two means of paired observations, by the delta method.
    nan where `first` is never true.
    """
    n = first.size
    share = float(first.mean()) if n else 0.0
    if share == 0:
        return Estimate(math.nan, -math.inf, math.inf, n)
    difference = paired_difference(first, second)
    ratio = difference.value / (100 * share)
    residual = first.astype(np.float64) - second - ratio * first
    spread = Z95 * float(residual.std()) / (share * math.sqrt(n))
    half = max(100 * spread, (difference.high - difference.low) / (2 * share) * (spread == 0))
    return Estimate(100 * ratio, 100 * ratio - half, 100 * ratio + half, n)


def largest_drop(
    expected: Int32[np.ndarray, " samples"],
    answers: Int32[np.ndarray, " samples"],
    labels: Int64[np.ndarray, " samples"],
    classes: int,
) -> Estimate:
    """By how much the accuracy of the class that lost most fell, in percentage points.

    The interval holds for the largest of all drops, whichever class it is of: each class has one
    that is wide enough for all of them at once (Bonferroni). `samples` counts the images of the
    class that has fewest.
    """
    z = NormalDist().inv_cdf(1 - 0.025 / classes)
    counts = np.bincount(labels, minlength=classes)
    drops = [
        paired_difference(expected[of_class] == label, answers[of_class] == label, z)
        for label in range(classes)
        if (of_class := labels == label).any()
    ]
    return Estimate(
        max(drop.value for drop in drops),
        max(drop.low for drop in drops),
        max(drop.high for drop in drops),
        int(counts.min()),
    )


def per_class_accuracy(
    predicted: Int32[np.ndarray, " samples"], labels: Int64[np.ndarray, " samples"], classes: int
) -> tuple[float, ...]:
    """Accuracy in percent over the samples of each class; nan for a class without samples."""
    return tuple(
        100 * float((predicted[labels == c] == c).mean()) if (labels == c).any() else math.nan
        for c in range(classes)
    )
