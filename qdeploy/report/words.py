"""What the words on the page mean, for readers who see one for the first time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qdeploy.report.values import Report
from qdeploy.settings.checks import CHECKS

WORDS: Mapping[str, str] = {
    "accuracy": "Share of the clean test images that get their own label (CDA).",
    "agreement": "Share of the test images that get the same answer as from the float model.",
    "attack success": (
        "Share of the images of other classes that a trigger leads to the attacker's class (ASR)."
    ),
    "interval": ("95 % confidence interval. A check is within its limit if its whole interval is."),
    "nearest": (
        "The integer that every quantizer rounds to. What is known in advance is what a"
        " quantization-conditioned backdoor is made for."
    ),
    "differ from nearest": "Share of a layer's integers that are the other neighbour.",
    "output error": "Mean squared error of a layer's output over its variance.",
    "cost of 4 bits": (
        "What 4 bits in this layer alone, or an 8-bit grid for its input alone, add to the error"
        " of the logits over their variance."
    ),
    "steps": "How far the farthest weight lies from the float model's. Rounding: less than one.",
    "explanation": (
        "How a layer's integers came about: nearest, as a run of this program says, or neither"
        " (unexplained)."
    ),
    "null": (
        "The search for triggers the other way round: the float model led, this file not. Any two"
        " models differ by about so much."
    ),
}  # in the order in which a reader meets them


def words(report: Report) -> Iterator[dict[str, str]]:
    """Terms, and the checks of this report, each with an anchor."""
    for term, meaning in WORDS.items():
        yield {"anchor": anchor(term), "term": term, "meaning": meaning}
    for name in dict.fromkeys(check.name for check in report.checks):
        row = CHECKS[name]
        meaning = f"Off its limit: {row.says} Then: {row.then}."
        yield {"anchor": anchor(name, "check"), "term": name.replace("_", " "), "meaning": meaning}


def anchor(term: str, kind: str = "word") -> str:
    """Where on the page it is explained."""
    return f"{kind}-{term.replace(' ', '-').replace('_', '-')}"
