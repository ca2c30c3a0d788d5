"""report.json and the JSON of a scan: what is written, what is read back, and the schema of both.

One class says it all: `to_json` fills it, `read_report` validates against it, and `json_schema`
is generated from it. Within a schema version keys may be added; readers ignore what they do not
know. Whoever takes a key away, or changes what it says, raises `SCHEMA_VERSION`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from qdeploy.core.grids import IntType
from qdeploy.judging.verdict import Decision, Outcome, State
from qdeploy.settings.recipe import WeightGridSpec
from qdeploy.values import (
    Cleaning,
    Converted,
    DataUsed,
    Explanation,
    FileMade,
    Finding,
    FloatLayer,
    Latency,
    Origin,
    StageTime,
    Variant,
)

SCHEMA_VERSION = 1


def _null_for_nan(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


Finite = Annotated[float | None, AfterValidator(_null_for_nan)]  # null: was not measured
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Written(BaseModel):
    """Base of what is written and read back: keys that nobody here asks for may be added to it."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        from_attributes=True,
        populate_by_name=True,
        json_schema_serialization_defaults_required=True,
    )


class WrittenEstimate(Written):
    """In percent or percentage points, with the 95 % confidence interval."""

    value: Finite
    low: Finite = None
    high: Finite = None
    samples: int = Field(default=0, ge=0)


class WrittenCheck(Written):
    """A check; reports say `state`, or only `within`."""

    name: str
    value: Finite
    relation: Literal["<=", ">="]
    limit: float
    unit: str
    runtime: str | None = None
    subject: str | None = None  # the trigger, where there can be several
    samples: int | None = None
    needed_samples: int = 0
    low: Finite = None
    high: Finite = None
    decided_by: Decision = "interval"
    state: State | None = None
    within: bool | None = None
    required: bool = False

    @property
    def holds(self) -> bool:
        """The value was found to be within its limit."""
        return bool(self.within) if self.state is None else self.state == "within"


class WrittenClass(Written):
    name: str = Field(validation_alias="class", serialization_alias="class")
    accuracy: Finite


class WrittenRates(Written):
    """How one file did on one runtime; null beside the float model where there is none."""

    variant: Variant
    runtime: str
    accuracy: WrittenEstimate
    top5_accuracy: WrittenEstimate | None = None  # null: there are few classes
    balanced_accuracy: Finite = None  # the mean over classes
    class_accuracy: tuple[WrittenClass, ...] = ()
    accuracy_drop: WrittenEstimate | None = None
    accuracy_drop_relative: WrittenEstimate | None = None
    class_drop: WrittenEstimate | None = None
    agreement: WrittenEstimate | None = None
    attack_success: dict[str, WrittenEstimate]
    attack_success_rise: dict[str, WrittenEstimate]


class WrittenAgreement(Written):
    """The file on one runtime, beside the first of the device."""

    runtime: str
    agreement: WrittenEstimate | None  # null: nothing was asked there
    difference: float | None = None  # the largest of a logit, percent of their range
    boundary: WrittenEstimate | None = None  # inputs between two classes that are given no third
    milliseconds: float | None = None  # of one image, median
    kernels: Mapping[str, int] = {}  # as the runtime has rewritten the file; {} if unknown
    unsupported: str | None = None  # why the file does not run there


class WrittenLayer(Written):
    """A layer as it was planned, and as it was rounded unless the run ended before."""

    name: str
    operators: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    bits: Literal[4, 8] | None = None
    max_code: int | None = None
    grid: WeightGridSpec | None = None
    storage: IntType | None = None
    rounding_planned: str | None = None
    rounding_used: str | None = None
    degraded: str | None = None  # why the planned method was not used
    flipped: float | None = None
    output_error: Finite = None
    nearest_output_error: Finite = None
    codes_sha256: Sha256 | None = None
    seconds: float | None = None


class WrittenTrace(Written):
    """How the integers of a layer came about."""

    name: str
    shape: tuple[int, ...] = ()
    storage: str | None = None
    bits: int | None = None
    weights: int | None = None
    flipped: float | None = None  # share of codes that are not nearest to the float weights
    steps: Finite = None
    saturated: int | None = None
    bias_shift: Finite = None
    rounded_at_load: bool = False
    codes_sha256: Sha256
    scales_sha256: Sha256
    explanation: Explanation


class WrittenProvenance(Written):
    not_compared: str | None = None
    differences: tuple[Finding, ...] = ()
    layers: tuple[WrittenTrace, ...]


class WrittenCrowding(Written):
    """What one convention's cells say of the float weights."""

    bits: int
    range: str
    per: str
    score: Finite
    ratio: Finite
    layer: str  # the most crowded one
    layer_ratio: Finite


class WrittenLead(Written):
    """A perturbation that leads images to a class in one model and not in the other."""

    name: str = Field(validation_alias="class", serialization_alias="class")
    kind: str
    size: float  # share of the largest of its kind
    led: WrittenEstimate


class WrittenHardening(Written):
    """One time that all integers were chosen again."""

    classes: tuple[int, ...]
    before: Finite
    after: Finite
    still: Finite = None  # that what was found before still led
    moved: float
    seconds: float
    failed: str | None = None  # why it did not come to an end; the file is then as it was


class WrittenDifferential(Written):
    """What a search for triggers that only the file answers to has found."""

    best: WrittenLead
    null: WrittenLead  # the float model led, the file not
    others: tuple[WrittenLead, ...] = ()
    screened: int  # classes
    classes: int
    pictures: int  # searched with
    fidelity: float  # percent of answers that the search's own arithmetic has as the runtime
    seconds: float
    arithmetic: str = "exact"  # of the file where the best leads


class WrittenSensitivity(Written):
    """What one layer's rounding alone adds to the error of the logits, over their variance."""

    layer: str
    weights: int
    four_bits: Finite = None
    input: Finite = None  # of its input on an 8-bit grid


class WrittenBits(Written):
    """How bits were given to layers."""

    average_bits: float
    agreement: float  # percent of the calibration images, of the choice
    wanted: float
    rounding: str  # that was measured with
    layers: tuple[WrittenSensitivity, ...]


class WrittenReport(Written):
    """What a run of qdeploy found out. Percent and percentage points; null: not measured."""

    schema_version: Literal[1]
    outcome: Outcome
    reasons: tuple[str, ...]  # why it is not ACCEPT
    next_steps: tuple[str, ...] = ()  # what can be done about it
    not_measured: tuple[str, ...] = ()  # what an ACCEPT does not speak of
    notes: tuple[str, ...] = ()
    output: str | None = None
    converted: Converted | None = None  # the file in the format of its device
    run_id: str
    started: str  # UTC, ISO 8601
    command: str = ""
    versions: dict[str, str]
    origin: Origin | None
    cleaning: Cleaning | None = None
    checks: tuple[WrittenCheck, ...]
    required: tuple[str, ...]
    measurements: tuple[WrittenRates, ...]
    runtime_agreement: tuple[WrittenAgreement, ...]
    latency: tuple[Latency, ...]
    files: tuple[FileMade, ...]
    layers: tuple[WrittenLayer, ...]
    findings: tuple[Finding, ...] = ()
    provenance: WrittenProvenance | None = None
    fingerprints: tuple[WrittenCrowding, ...] = ()
    differential: WrittenDifferential | None = None
    hardening: tuple[WrittenHardening, ...] = ()
    bits: WrittenBits | None = None  # null: they were given
    left_float: tuple[FloatLayer, ...] = ()
    data: tuple[DataUsed, ...]
    stages: tuple[StageTime, ...] = ()
    recipe: Mapping[str, Any] | None = None  # null: the file was made elsewhere
    policy: Mapping[str, Any] | None = None
    device: Mapping[str, Any] | None = None

    @property
    def judged_sha256(self) -> str | None:
        """The digest of the file that the outcome is about; None if there is not just one."""
        judged = [f.sha256 for f in self.files if f.variant == "result"]
        return judged[0] if len(judged) == 1 else None

    @property
    def judged_digests(self) -> frozenset[str]:
        """The same, and that of what was converted from it and measured beside it."""
        judged, converted = self.judged_sha256, self.converted
        if judged is None:
            return frozenset()
        return frozenset({judged} | ({converted.sha256} if converted is not None else set()))


class WrittenScan(Written):
    """One file that was looked at without running it."""

    path: str
    sha256: str  # empty if the file cannot be read
    findings: tuple[Finding, ...]
    fingerprints: tuple[WrittenCrowding, ...]
    not_scanned: str | None
    failed: str | None


class WrittenScans(Written):
    """What `qdeploy scan` saw."""

    schema_version: Literal[1]
    version: str
    files: tuple[WrittenScan, ...]


DOCUMENTS: Mapping[str, type[Written]] = {"report": WrittenReport, "scan": WrittenScans}


def json_schema(document: type[Written]) -> dict[str, Any]:
    """The JSON schema (2020-12) of a document as it is written: every key is there."""
    schema = document.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
