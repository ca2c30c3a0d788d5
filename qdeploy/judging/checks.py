"""How every check is measured: from the results of a run to values beside their limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from qdeploy.core.metrics import Estimate
from qdeploy.detectors.known import Answer, Detected
from qdeploy.inputs.opened import Calibration, Evidence
from qdeploy.judging.measure import Measured
from qdeploy.judging.rates import AgainstFloat, ArmRates, RuntimeAgreement
from qdeploy.judging.verdict import Check
from qdeploy.provenance.trace import LayerTrace, Provenance
from qdeploy.settings.checks import ROWS, CheckRow
from qdeploy.settings.device import BudgetSpec
from qdeploy.settings.policy import GateSpec
from qdeploy.values import (
    BitSearch,
    Cleaning,
    Explanation,
    Finding,
    FloatLayer,
    HardeningRound,
    LayerPlan,
    Origin,
    RoundedLayer,
    named_classes,
)

LayerDigest = tuple[str, str]  # sha256 of a layer's codes and of its scales
NOWHERE = Origin("", "", "")


@dataclass(frozen=True, slots=True)
class LayersAsMade:
    """What became of the planned layers."""

    layers: Sequence[RoundedLayer]
    left_float: Sequence[FloatLayer]
    wrong_codes: int  # integers in the file that are not the chosen ones


@dataclass(frozen=True, slots=True)
class Results:
    """What there is to be judged."""

    origin: Origin
    classes: int
    evidence: Evidence
    measured: Measured
    static: tuple[Finding, ...]  # of the file
    detected: Mapping[str, Answer] = field(default_factory=dict)  # by check
    provenance: Provenance | None = None  # None: there is no float model
    known: AbstractSet[LayerDigest] = frozenset()
    calibration: Calibration | None = None  # None, as the next two: the file was made elsewhere
    plan: tuple[LayerPlan, ...] = ()
    made: LayersAsMade | None = None
    notes: tuple[str, ...] = ()  # what was done to come to them
    cleaning: Cleaning | None = None
    hardening: tuple[HardeningRound, ...] = ()
    bits: BitSearch | None = None  # None: they were given
    class_names: tuple[str, ...] = ()

    @property
    def runtime(self) -> str | None:
        """The first that the file was run on."""
        rates = self.measured.rates
        return rates[0].arm.runtime if rates else None


class Found(NamedTuple):
    """A measured value, and of what."""

    value: float
    runtime: str | None = None
    subject: str | None = None
    samples: int | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, rate: Estimate, runtime: str | None, subject: str | None = None) -> Found:
        """A rate with its interval."""
        return cls(rate.value, runtime, subject, rate.samples, rate.low, rate.high)


Measure = Callable[[Results, GateSpec], Iterator[Found]]


def checks_of(results: Results, gate: GateSpec, budget: BudgetSpec) -> tuple[Check, ...]:
    """Every check that has a limit, and something to hold against it."""
    return tuple(
        _check(row, found, limit, gate)
        for row in ROWS
        if (limit := gate.limit(row, budget)) is not None
        for found in MEASURES[row.name](results, gate)
    )


def decided(one: ArmRates, beside: RuntimeAgreement, evidence: Evidence, gate: GateSpec) -> bool:
    """Whether all that is known of one runtime lies on one side of its limit.

    Its interval does, also of what the policy decides by its value once everything was asked.
    """
    measured = Measured((), (one,), runtimes=(beside,))
    known = Results(NOWHERE, len(one.class_accuracy), evidence, measured, ())
    checks = checks_of(known, gate, BudgetSpec())
    return all(
        replace(check, decided_by="interval").state in {"within", "off"}
        for check in checks
        if check.runtime == one.arm.runtime
    )


def _check(row: CheckRow, found: Found, limit: float, gate: GateSpec) -> Check:
    needed = {"images": gate.min_images, "images of a class": gate.min_class_images}
    return Check(
        row.name,
        found.value,
        row.relation,
        limit,
        row.unit,
        found.runtime,
        found.subject,
        found.samples,
        needed[row.sampled] if row.sampled is not None else 0,
        found.low,
        found.high,
        "value" if row.by_value or row.name in gate.decided_by_value else "interval",
    )


def _static_findings(results: Results, gate: GateSpec) -> Iterator[Found]:
    """No rule of the static scan is broken in a way that nobody has allowed."""
    broken = [finding.rule for finding in results.static if stands_against(finding, gate)]
    yield Found(float(len(broken)), subject=_some(broken))


def stands_against(finding: Finding, gate: GateSpec) -> bool:
    """An error that nobody has waived, or a warning that this policy takes for one."""
    if finding.level == "warning":
        return _matches(finding.rule, gate.refuse_findings)
    return finding.level == "error" and not _matches(finding.rule, gate.waived("finding"))


def _alone(of: Callable[[ArmRates], Mapping[str | None, Estimate]]) -> Measure:
    """A rate of the result on every runtime, by itself: by trigger, or one for None."""

    def measure(results: Results, _: GateSpec) -> Iterator[Found]:
        for arm in results.measured.rates:
            if arm.arm.variant == "result":
                for subject, rate in of(arm).items():
                    yield Found.of(rate, arm.arm.runtime, subject)

    return measure


def _beside(of: Callable[[AgainstFloat], Mapping[str | None, Estimate]]) -> Measure:
    """The same of how the result compares with its float model."""

    def compared(arm: ArmRates) -> Mapping[str | None, Estimate]:
        return {} if arm.against_float is None else of(arm.against_float)

    return _alone(compared)


def _by_trigger(rates: Mapping[str, Estimate]) -> Mapping[str | None, Estimate]:
    return dict(rates.items())


def _runtime_agreement(results: Results, _: GateSpec) -> Iterator[Found]:
    """The result answers the same on every runtime."""
    for other in results.measured.runtimes:
        if other.agreement is not None:
            yield Found.of(other.agreement, other.runtime)


def _boundary_agreement(results: Results, _: GateSpec) -> Iterator[Found]:
    """What lies between two classes is answered by one of them on every runtime."""
    for other in results.measured.runtimes:
        if other.boundary is not None:
            yield Found.of(other.boundary, other.runtime)


def _unsupported_runtimes(results: Results, _: GateSpec) -> Iterator[Found]:
    """The result runs everywhere where it is to run."""
    others = results.measured.runtimes
    if others:
        refused = [f"{one.runtime}: {one.unsupported}" for one in others if one.unsupported]
        yield Found(float(len(refused)), subject=refused[0] if refused else None)


def _saturable_pairs(results: Results, _: GateSpec) -> Iterator[Found]:
    """What x86 without VNNI computes otherwise than other processors."""
    found = results.measured.saturable
    if found is not None:
        share = 100 * found.pairs / found.of if found.of else 0.0
        yield Found(share, subject=found.layers[0] if found.layers else None)


def _batch_invariance(results: Results, _: GateSpec) -> Iterator[Found]:
    """The result answers an image the same, whatever shares its batch."""
    for one in results.measured.batches:
        yield Found.of(one.alike, one.runtime)


def _layers_as_planned(results: Results, gate: GateSpec) -> Iterator[Found]:
    """No layer was left float or lost its method, but for those that somebody has allowed."""
    if results.made is not None:
        lost = [layer.name for layer in results.made.layers if layer.degraded is not None]
        left = [layer.name for layer in results.made.left_float if not layer.chosen]
        unplanned = [
            *(name for name in left if not _matches(name, gate.waived("float"))),
            *(name for name in lost if not _matches(name, gate.waived("degraded"))),
        ]
        yield Found(float(len(unplanned)), subject=_some(unplanned))


def _codes_as_chosen(results: Results, _: GateSpec) -> Iterator[Found]:
    if results.made is not None:
        yield Found(float(results.made.wrong_codes))


def _source_differences(results: Results, _: GateSpec) -> Iterator[Found]:
    """The file is its source but for rounding."""
    provenance = results.provenance
    if provenance is not None and provenance.not_compared is None:
        places = [difference.where for difference in provenance.differences]
        yield Found(float(len(places)), subject=_some(places))


def _weight_steps(results: Results, _: GateSpec) -> Iterator[Found]:
    if layers := _traced(results):
        far = max(layers, key=lambda layer: layer.steps)
        yield Found(far.steps, subject=far.name)


def _bias_shift(results: Results, _: GateSpec) -> Iterator[Found]:
    if layers := _traced(results):
        moved = max(layers, key=lambda layer: layer.bias_shift)
        yield Found(moved.bias_shift, subject=moved.name)


def _unexplained_rounding(results: Results, _: GateSpec) -> Iterator[Found]:
    """The rounding is one that can be explained: to nearest, or as a run has reported it."""
    if layers := _traced(results):
        strange = [x for x in layers if explanation(x, results.known) == "unexplained"]
        share = sum(x.weights for x in strange) / sum(x.weights for x in layers)
        yield Found(100 * share, subject=_some([x.name for x in strange]))


def _traced(results: Results) -> tuple[LayerTrace, ...]:
    """The layers that were found in the reference; none where the graphs cannot be compared."""
    found = results.provenance
    return () if found is None or found.not_compared is not None else found.layers


def explanation(layer: LayerTrace, known: AbstractSet[LayerDigest]) -> Explanation:
    """How the integers of a layer came about: nearest rounding is, whoever has reported it."""
    if layer.nearest_rounded:
        return "nearest"
    reported = (layer.codes_sha256, layer.scales_sha256) in known
    return "as reported" if reported else "unexplained"


def _detected(name: str) -> Measure:
    """What a detector has found. Where it could not look there is no check: that is no score."""

    def measure(results: Results, _: GateSpec) -> Iterator[Found]:
        found = results.detected.get(name)
        if isinstance(found, Detected) and found.rate is not None:
            yield Found.of(found.rate, results.runtime, found.subject)
        elif isinstance(found, Detected):
            yield Found(found.value, subject=found.subject)

    return measure


def _remaining_shortcuts(results: Results, _: GateSpec) -> Iterator[Found]:
    """No class is still reached too easily, where a sanitizer looked for such classes."""
    cleaning = results.cleaning
    if cleaning is not None and cleaning.remaining is not None:
        left = cleaning.remaining
        names = named_classes(left, results.class_names) if left else None
        yield Found(float(len(left)), subject=names)


def _hardening_rounds(results: Results, _: GateSpec) -> Iterator[Found]:
    """How often the integers had to be chosen again."""
    if results.made is not None:
        yield Found(float(len(results.hardening)))


def _file_bytes(results: Results, _: GateSpec) -> Iterator[Found]:
    for file in results.measured.files:
        if file.variant == "result":
            yield Found(float(file.size_bytes))


def _latency_ms(results: Results, _: GateSpec) -> Iterator[Found]:
    timed = [x for x in results.measured.latencies if x.variant == "result" and x.batch == 1]
    for one in timed[:1]:
        value, low, high = (1e3 * seconds for seconds in (one.seconds, one.low, one.high))
        yield Found(value, samples=one.runs, low=low, high=high)


def _latency_ratio(results: Results, _: GateSpec) -> Iterator[Found]:
    """The ends are those of the medians that favour the ratio most and least."""
    of = {x.variant: x for x in results.measured.latencies if x.batch == 1}
    if "result" in of and "fp32" in of and of["fp32"].low > 0:  # a browser's clock may stand still
        file, model = of["result"], of["fp32"]
        ends = file.low / model.high, file.high / model.low
        yield Found(file.seconds / model.seconds, None, None, file.runs, *ends)


MEASURES: Mapping[str, Measure] = {
    "static_findings": _static_findings,
    "accuracy": _alone(lambda arm: {None: arm.accuracy}),
    "attack_success": _alone(lambda arm: _by_trigger(arm.attack_success)),
    "accuracy_drop": _beside(lambda found: {None: found.accuracy_drop}),
    "accuracy_drop_relative": _beside(lambda found: {None: found.accuracy_drop_relative}),
    "class_drop": _beside(lambda found: {None: found.class_drop}),
    "agreement": _beside(lambda found: {None: found.agreement}),
    "attack_success_rise": _beside(lambda found: _by_trigger(found.attack_success_rise)),
    "runtime_agreement": _runtime_agreement,
    "boundary_agreement": _boundary_agreement,
    "unsupported_runtimes": _unsupported_runtimes,
    "saturable_pairs": _saturable_pairs,
    "batch_invariance": _batch_invariance,
    "layers_as_planned": _layers_as_planned,
    "codes_as_chosen": _codes_as_chosen,
    "source_differences": _source_differences,
    "weight_steps": _weight_steps,
    "bias_shift": _bias_shift,
    "unexplained_rounding": _unexplained_rounding,
    "remaining_shortcuts": _remaining_shortcuts,
    "hardening_rounds": _hardening_rounds,
    "file_bytes": _file_bytes,
    "latency_ms": _latency_ms,
    "latency_ratio": _latency_ratio,
    **{row.name: _detected(row.name) for row in ROWS if row.detector is not None},
}


def _matches(name: str, names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in names)


def _some(names: Sequence[str]) -> str | None:
    """The first few different ones."""
    different = list(dict.fromkeys(names))
    return ", ".join(different[:3]) + (", ..." if len(different) > 3 else "") or None
