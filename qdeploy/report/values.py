"""What a run found out, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from qdeploy.detectors.crowding import CellCrowding
from qdeploy.detectors.differential import Differential
from qdeploy.judging.rates import ArmRates, RuntimeAgreement, Sample
from qdeploy.judging.verdict import Check, Outcome
from qdeploy.provenance.trace import Provenance
from qdeploy.values import (
    BitSearch,
    Cleaning,
    Converted,
    DataUsed,
    FileMade,
    Finding,
    FloatLayer,
    HardeningRound,
    Latency,
    LayerPlan,
    Origin,
    RoundedLayer,
    StageTime,
    Variant,
)

VARIANT_NAMES: Mapping[Variant, str] = {
    "source": "before cleaning",
    "fp32": "FP32",
    "nearest": "nearest",
    "result": "this file",
}


@dataclass(frozen=True, slots=True)
class Report:
    run_id: str
    started: str  # UTC, ISO 8601
    versions: Mapping[str, str]
    command: str
    origin: Origin
    recipe: Mapping[str, Any] | None  # None: the file was made elsewhere
    policy: Mapping[str, Any]
    device: Mapping[str, Any]
    data: tuple[DataUsed, ...]
    stages: tuple[StageTime, ...]
    plan: tuple[LayerPlan, ...]
    layers: tuple[RoundedLayer, ...]
    left_float: tuple[FloatLayer, ...]
    files: tuple[FileMade, ...]
    classes: tuple[str, ...]
    rates: tuple[ArmRates, ...]
    runtimes: tuple[RuntimeAgreement, ...]
    latencies: tuple[Latency, ...]
    checks: tuple[Check, ...]
    required: frozenset[str]
    outcome: Outcome
    reasons: tuple[str, ...]  # why it is not ACCEPT
    next_steps: tuple[str, ...]  # what can be done about it
    not_measured: tuple[str, ...]  # what an ACCEPT does not speak of
    notes: tuple[str, ...]
    crowding: tuple[CellCrowding, ...]  # of the float weights, the strongest first
    hardening: tuple[HardeningRound, ...]  # how often integers were chosen again, and why
    differential: Differential | None  # None: nothing was searched
    bits: BitSearch | None  # None: they were given
    findings: tuple[Finding, ...]  # what is seen in the file without running it
    provenance: Provenance | None  # None: there is no float model
    explanations: Mapping[str, str]  # how the integers of a layer came about, by its name
    samples: tuple[Sample, ...]  # a few images and what was said to them
    cleaning: Cleaning | None  # None: the float model is as it was given
    output: str | None  # where the file was put
    converted: Converted | None = None  # what was put beside it

    @property
    def judged(self) -> str:
        """The file that the verdict is about: where it lies, or what it would have been made of."""
        return self.output or self.origin.path

    @property
    def from_what(self) -> str:
        """Where the judged file comes from, in words."""
        source = self.origin.path
        if source == self.judged:
            return ""
        return f"judged beside {source}" if self.recipe is None else f"made from {source}"

    def _repr_html_(self) -> str:
        """The page, in a frame of its own: what notebooks show."""
        from qdeploy.report.to_html import to_html

        page = escape(to_html(self).decode("utf-8"))
        return f'<iframe srcdoc="{page}" width="100%" height="800" sandbox></iframe>'
