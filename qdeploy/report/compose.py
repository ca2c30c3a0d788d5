"""From what was done and measured to the report: checks, outcome, reasons, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qdeploy import __version__
from qdeploy.checks import (
    LayersAsMade,
    check_budget,
    check_crowding,
    check_layers,
    check_rates,
    check_runtimes,
)
from qdeploy.inputs import Calibration, Evidence, Request
from qdeploy.model import FloatModel, LayerPlan
from qdeploy.packages import installed_versions
from qdeploy.progress import Clock
from qdeploy.report.values import Report, StageTime
from qdeploy.scan.fingerprints import Scan
from qdeploy.sources import CARD
from qdeploy.stages.validate import Measured
from qdeploy.verdict import Check, Outcome, explain, judge

MADE_HERE = frozenset({"layers_as_planned", "codes_as_chosen"})
SPOKEN_OF = (
    "accuracy_drop",
    "agreement",
    "attack_success",
    "runtime_agreement",
    *sorted(MADE_HERE),
)


@dataclass(frozen=True, slots=True)
class Findings:
    """What there is to be judged."""

    model: FloatModel
    evidence: Evidence
    measured: Measured
    scan: Scan  # of the float model
    calibration: Calibration | None = None  # None, as the next two: the file was made elsewhere
    plan: tuple[LayerPlan, ...] = ()
    made: LayersAsMade | None = None


def compose(request: Request, findings: Findings, clock: Clock, run_id: str) -> Report:
    """The whole report but for the place of the output."""
    gate, made, measured = request.recipe.gate, findings.made, findings.measured
    evidence, calibration = findings.evidence, findings.calibration
    sizes = {f.variant: f.size_bytes for f in measured.files}
    checks: tuple[Check, ...] = (
        *check_rates(measured.rates, gate),
        *check_runtimes(measured.runtimes, gate),
        *(check_layers(made, gate) if made is not None else ()),
        *check_crowding(findings.scan, gate),
        *check_budget(sizes["result"], measured.latencies, request.device.budget),
    )
    required = gate.required | (gate.required_with_trigger if evidence.triggers else frozenset())
    if made is None:
        required -= MADE_HERE
    outcome, absent = judge(checks, required), _absent(request, findings)
    reasons = explain(checks, required, absent=absent)
    if calibration is not None and calibration.synthetic is not None:
        reasons += (f"calibrated on images made from the model itself ({calibration.synthetic})",)
        outcome = Outcome.NO_VERDICT if outcome is Outcome.ACCEPT else outcome
    card = request.sources.card
    names = card.model.classes if card is not None else None
    return Report(
        run_id=run_id,
        started=clock.started,
        versions={"qdeploy": __version__, **installed_versions()},
        command=request.command,
        origin=findings.model.origin,
        recipe=request.recipe.model_dump(mode="json"),
        device=request.device.model_dump(mode="json"),
        data=(*(calibration.used if calibration is not None else ()), *evidence.used),
        stages=tuple(StageTime(name, seconds) for name, seconds in clock.times),
        plan=findings.plan,
        layers=tuple(made.layers) if made is not None else (),
        left_float=tuple(made.left_float) if made is not None else (),
        files=measured.files,
        classes=names or tuple(map(str, range(findings.model.classes))),
        rates=measured.rates,
        runtimes=measured.runtimes,
        latencies=measured.latencies,
        checks=checks,
        required=frozenset(required),
        outcome=outcome,
        reasons=reasons,
        not_measured=_not_measured(checks, absent),
        notes=(*_notes(request, evidence), *_fingerprint_notes(findings.scan)),
        fingerprints=findings.scan.fingerprints,
        samples=measured.samples,
        output=None,
    )


def _absent(request: Request, findings: Findings) -> dict[str, str]:
    """Why a check that is not there could not be made."""
    no_test = "no test data" if findings.evidence.images is None else None
    no_trigger = no_test or (None if findings.evidence.triggers else "no trigger is known")
    one_runtime = "the device profile names one runtime"
    elsewhere = "the file was made elsewhere" if findings.made is None else None
    reasons = {
        "accuracy_drop": no_test,
        "class_drop": no_test or "the recipe sets no limit",
        "agreement": no_test,
        "attack_success": no_trigger,
        "attack_success_rise": no_trigger,
        "runtime_agreement": no_test
        or (one_runtime if len(request.device.runtimes) == 1 else None),
        "layers_as_planned": elsewhere,
        "codes_as_chosen": elsewhere,
        "cell_crowding": "the recipe sets no limit",
        "file_bytes": "the device profile sets no budget",
        "latency_ms": "the device profile sets no budget",
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _not_measured(checks: tuple[Check, ...], absent: Mapping[str, str]) -> tuple[str, ...]:
    """What the evidence does not speak of, though a reader might take it for granted."""
    made = {check.name for check in checks}
    names = (name for name in SPOKEN_OF if name not in made and name in absent)
    return tuple(f"{name}: {absent[name]}" for name in names)


def _fingerprint_notes(scan: Scan) -> tuple[str, ...]:
    """That the float weights know of a quantizer's cells: no training does that by itself."""
    found = scan.found
    if found is None:
        return ()
    return (
        f"the float weights crowd at the cell edges of {found.convention}: {found.worst.ratio:.1f}"
        f" times as many as there should be in {found.layer}; the model was made for that"
        " quantizer",
    )


def _notes(request: Request, evidence: Evidence) -> tuple[str, ...]:
    """Whose word the evidence is: a card comes from the model's author, who may be the attacker."""
    roles = dict.fromkeys(data.role for data in evidence.used if data.given_by == CARD)
    things = " and ".join({"test": "test data"}.get(role, role) for role in roles)
    card = request.sources.card
    notes: list[str] = []
    if things:
        notes.append(f"{things}: as named by the model's own card, {request.sources.card_path}")
    if card is not None and card.poisoned is not None:
        notes.append(f"the card says that the model is poisoned on purpose: {card.poisoned.attack}")
    return tuple(notes)
