"""The checks of a gate, from what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qdeploy.device import BudgetSpec
from qdeploy.evidence import ArmRates, RuntimeAgreement
from qdeploy.model import FloatLayer, Latency, RoundedLayer
from qdeploy.recipe import GateSpec
from qdeploy.scan.fingerprints import Scan
from qdeploy.verdict import Check, Limit


def check_rates(rates: Sequence[ArmRates], gate: GateSpec) -> Iterator[Check]:
    """Accuracy, agreement and attack success of the result on every runtime."""
    needed = gate.min_images
    drop = Limit("accuracy_drop", "<=", gate.max_accuracy_drop, "points", needed)
    agreement = Limit("agreement", ">=", gate.min_agreement, "%", needed)
    success = Limit("attack_success", "<=", gate.max_attack_success, "%", needed)
    rise = Limit("attack_success_rise", "<=", gate.max_attack_success_rise, "points", needed)
    for arm in rates:
        if arm.arm.variant != "result":
            continue
        runtime = arm.arm.runtime
        yield drop.check(arm.accuracy_drop, runtime)
        if gate.max_class_drop is not None:
            few = gate.min_class_images
            limit = Limit("class_drop", "<=", gate.max_class_drop, "points", few)
            yield limit.check(arm.class_drop, runtime)
        yield agreement.check(arm.agreement, runtime)
        for trigger, estimate in arm.attack_success.items():
            yield success.check(estimate, runtime, trigger)
            yield rise.check(arm.attack_success_rise[trigger], runtime, trigger)


def check_runtimes(agreements: Sequence[RuntimeAgreement], gate: GateSpec) -> Iterator[Check]:
    """The result answers the same on every runtime."""
    limit = Limit("runtime_agreement", ">=", gate.min_runtime_agreement, "%", gate.min_images)
    for other in agreements:
        yield limit.check(other.agreement, other.runtime)


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
    unplanned = _not_allowed(left, gate.allow_float) + _not_allowed(lost, gate.allow_degraded)
    subject = ", ".join(unplanned[:3]) + (", ..." if len(unplanned) > 3 else "") or None
    yield Check(
        "layers_as_planned", float(len(unplanned)), "<=", 0.0, "layers off plan", subject=subject
    )
    yield Check("codes_as_chosen", float(made.wrong_codes), "<=", 0.0, "wrong integers")


def check_crowding(scan: Scan, gate: GateSpec) -> Iterator[Check]:
    """The float weights were not made for a quantizer, where the recipe minds."""
    if gate.max_cell_crowding is not None:
        subject = str(scan.fingerprints[0].convention) if scan.fingerprints else None
        limit = gate.max_cell_crowding
        yield Check("cell_crowding", scan.score, "<=", limit, "sd", subject=subject)


def check_budget(
    file_bytes: int, latencies: Sequence[Latency], budget: BudgetSpec
) -> Iterator[Check]:
    """The limits of the device, where its profile has any."""
    if budget.file_bytes is not None:
        yield Check("file_bytes", float(file_bytes), "<=", float(budget.file_bytes), "bytes")
    single = [x.seconds * 1e3 for x in latencies if x.variant == "result" and x.batch == 1]
    if budget.latency_ms is not None and single:
        yield Check("latency_ms", single[0], "<=", budget.latency_ms, "ms")


def _not_allowed(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if not any(fnmatchcase(name, p) for p in patterns)]
