"""The checks of a gate, from what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from qdeploy.detectors.crowding import Scan
from qdeploy.judging.rates import AgainstFloat, ArmRates, BatchInvariance, RuntimeAgreement
from qdeploy.judging.verdict import Check, Decision, Limit
from qdeploy.provenance.trace import LayerTrace, Provenance
from qdeploy.settings.device import BudgetSpec
from qdeploy.settings.policy import CheckName, GateSpec
from qdeploy.values import Cleaning, Finding, FloatLayer, Latency, RoundedLayer, named_classes

UNITS = {
    "accuracy_drop": "points",
    "class_drop": "points",
    "attack_success_rise": "points",
}  # of rates; percent where not named
LayerDigest = tuple[str, str]  # sha256 of a layer's codes and of its scales


def check_rates(rates: Sequence[ArmRates], gate: GateSpec) -> Iterator[Check]:
    """Accuracy, agreement and attack success of the result on every runtime."""
    for arm in rates:
        if arm.arm.variant == "result":
            yield from _check_alone(arm, gate)
            if arm.against_float is not None:
                yield from _check_beside(arm.against_float, arm.arm.runtime, gate)


def check_runtimes(agreements: Sequence[RuntimeAgreement], gate: GateSpec) -> Iterator[Check]:
    """The result answers the same on every runtime."""
    limit = _limit("runtime_agreement", ">=", gate.min_runtime_agreement, gate)
    for other in agreements:
        yield limit.check(other.agreement, other.runtime)


def check_batches(found: Sequence[BatchInvariance], gate: GateSpec) -> Iterator[Check]:
    """The result answers an image the same, whatever shares its batch."""
    limit = _limit("batch_invariance", ">=", gate.min_batch_invariance, gate)
    limit = replace(limit, needed_samples=0)  # they are not test images; their interval says enough
    for one in found:
        yield limit.check(one.alike, one.runtime)


def _check_alone(arm: ArmRates, gate: GateSpec) -> Iterator[Check]:
    runtime = arm.arm.runtime
    if gate.min_accuracy is not None:
        yield _limit("accuracy", ">=", gate.min_accuracy, gate).check(arm.accuracy, runtime)
    success = _limit("attack_success", "<=", gate.max_attack_success, gate)
    for trigger, estimate in arm.attack_success.items():
        yield success.check(estimate, runtime, trigger)


def _check_beside(found: AgainstFloat, runtime: str, gate: GateSpec) -> Iterator[Check]:
    drop = _limit("accuracy_drop", "<=", gate.max_accuracy_drop, gate)
    yield drop.check(found.accuracy_drop, runtime)
    if gate.max_accuracy_drop_relative is not None:
        limit = _limit("accuracy_drop_relative", "<=", gate.max_accuracy_drop_relative, gate)
        yield limit.check(found.accuracy_drop_relative, runtime)
    if gate.max_class_drop is not None:
        limit = _limit("class_drop", "<=", gate.max_class_drop, gate)
        yield limit.check(found.class_drop, runtime)
    agreement = _limit("agreement", ">=", gate.min_agreement, gate)
    yield agreement.check(found.agreement, runtime)
    rise = _limit("attack_success_rise", "<=", gate.max_attack_success_rise, gate)
    for trigger, estimate in found.attack_success_rise.items():
        yield rise.check(estimate, runtime, trigger)


def _limit(name: CheckName, relation: Literal["<=", ">="], limit: float, gate: GateSpec) -> Limit:
    return Limit(
        name=name,
        relation=relation,
        limit=limit,
        unit=UNITS.get(name, "%"),
        needed_samples=gate.min_class_images if name == "class_drop" else gate.min_images,
        decided_by=_decision(name, gate),
    )


def _decision(name: CheckName, gate: GateSpec) -> Decision:
    return "value" if name in gate.decided_by_value else "interval"


def check_static(findings: Sequence[Finding], gate: GateSpec) -> Check:
    """No rule of the static scan is broken in a way that nobody has allowed."""
    broken = [f for f in findings if stands_against(f, gate)]
    rules = _some([f.rule for f in broken])
    return Check("static_findings", float(len(broken)), "<=", 0.0, "findings", subject=rules)


def stands_against(finding: Finding, gate: GateSpec) -> bool:
    """An error that nobody has waived, or a warning that this policy takes for one."""
    if finding.level == "warning":
        return _matches(finding.rule, gate.refuse_findings)
    return finding.level == "error" and not _matches(finding.rule, gate.waived("finding"))


def _matches(name: str, names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in names)


def check_provenance(
    found: Provenance, known: AbstractSet[LayerDigest], gate: GateSpec
) -> Iterator[Check]:
    """The file is its source but for rounding, and the rounding is one that can be explained.

    Args:
        known: Layers as a run of this program has rounded them.
    """
    if found.not_compared is not None:
        return
    count, places = len(found.differences), [d.where for d in found.differences]
    yield Check("source_differences", float(count), "<=", 0.0, "differences", subject=_some(places))
    if gate.max_weight_steps is not None and found.layers:
        far = max(found.layers, key=lambda layer: layer.steps)
        limit = gate.max_weight_steps
        yield Check("weight_steps", far.steps, "<=", limit, "steps", subject=far.name)
    if gate.max_bias_shift is not None and found.layers:
        moved = max(found.layers, key=lambda layer: layer.bias_shift)
        limit, unit = gate.max_bias_shift, "of the weights"
        yield Check("bias_shift", moved.bias_shift, "<=", limit, unit, subject=moved.name)
    if gate.max_unexplained_rounding is not None and found.layers:
        strange = [x for x in found.layers if explanation(x, known) == "unexplained"]
        share = sum(x.weights for x in strange) / found.weights
        limit, names = gate.max_unexplained_rounding, _some([x.name for x in strange])
        yield Check("unexplained_rounding", 100 * share, "<=", limit, "%", subject=names)


def explanation(
    layer: LayerTrace, known: AbstractSet[LayerDigest]
) -> Literal["nearest", "as reported", "unexplained"]:
    """How the integers of a layer came about."""
    if (layer.codes_sha256, layer.scales_sha256) in known:
        return "as reported"
    return "nearest" if layer.nearest_rounded else "unexplained"


def _some(names: Sequence[str]) -> str | None:
    """The first few different ones."""
    different = list(dict.fromkeys(names))
    return ", ".join(different[:3]) + (", ..." if len(different) > 3 else "") or None


@dataclass(frozen=True, slots=True)
class LayersAsMade:
    """What became of the planned layers."""

    layers: Sequence[RoundedLayer]
    left_float: Sequence[FloatLayer]
    wrong_codes: int  # integers in the file that are not the chosen ones


def check_layers(made: LayersAsMade, gate: GateSpec) -> Iterator[Check]:
    """Nothing was left float, nothing lost its method, and the file holds what was chosen."""
    lost = [layer.name for layer in made.layers if layer.degraded is not None]
    left = [layer.name for layer in made.left_float]
    unplanned = [
        *(name for name in left if not _matches(name, gate.waived("float"))),
        *(name for name in lost if not _matches(name, gate.waived("degraded"))),
    ]
    yield Check(
        "layers_as_planned", float(len(unplanned)), "<=", 0.0, "layers off plan",
        subject=_some(unplanned),
    )  # fmt: skip
    yield Check("codes_as_chosen", float(made.wrong_codes), "<=", 0.0, "wrong integers")


def check_crowding(scan: Scan, gate: GateSpec) -> Iterator[Check]:
    """The float weights were not made for a quantizer, where the policy minds.

    Where there was nothing to look at there is no check: that is not a score of 0.
    """
    if gate.max_cell_crowding is not None and scan.fingerprints:
        subject = str(scan.fingerprints[0].convention)
        limit = gate.max_cell_crowding
        yield Check("cell_crowding", scan.score, "<=", limit, "sd", subject=subject)


def check_cleaning(
    cleaning: Cleaning | None, names: Sequence[str], gate: GateSpec
) -> Iterator[Check]:
    """No class is still reached too easily, where a sanitizer looked for such classes."""
    if cleaning is not None and cleaning.remaining is not None:
        remaining, limit = cleaning.remaining, float(gate.max_remaining_shortcuts)
        subject = named_classes(remaining, names) if remaining else None
        yield Check(
            "remaining_shortcuts", float(len(remaining)), "<=", limit, "classes", subject=subject
        )


def check_budget(
    file_bytes: int, latencies: Sequence[Latency], budget: BudgetSpec, gate: GateSpec
) -> Iterator[Check]:
    """The limits of the device, where its profile has any."""
    if budget.file_bytes is not None:
        yield Check("file_bytes", float(file_bytes), "<=", float(budget.file_bytes), "bytes")
    single = [x for x in latencies if x.variant == "result" and x.batch == 1]
    if budget.latency_ms is not None and single:
        value, low, high = (1e3 * t for t in (single[0].seconds, single[0].low, single[0].high))
        runs, by = single[0].runs, _decision("latency_ms", gate)
        yield Check(
            "latency_ms", value, "<=", budget.latency_ms, "ms",
            samples=runs, low=low, high=high, decided_by=by,
        )  # fmt: skip
