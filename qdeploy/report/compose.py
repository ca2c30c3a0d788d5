"""From what was done and measured to the report: checks, outcome, reasons, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from qdeploy import __version__
from qdeploy.detectors.crowding import Scan
from qdeploy.inputs.opened import Calibration, Evidence
from qdeploy.inputs.requests import Request
from qdeploy.inputs.sources import CARD
from qdeploy.judging.checks import (
    LayerDigest,
    LayersAsMade,
    check_batches,
    check_budget,
    check_cleaning,
    check_crowding,
    check_layers,
    check_provenance,
    check_rates,
    check_runtimes,
    check_static,
    explanation,
)
from qdeploy.judging.measure import Measured
from qdeploy.judging.soundness import objections, sound
from qdeploy.judging.verdict import Check, Outcome, explain, judge
from qdeploy.machine import installed_versions
from qdeploy.progress import Clock
from qdeploy.provenance.trace import Provenance
from qdeploy.report.values import Report, StageTime
from qdeploy.settings.device import misfit
from qdeploy.settings.policy import GateSpec
from qdeploy.settings.recipe import Recipe
from qdeploy.values import Cleaning, Finding, LayerPlan, Origin, named_classes

MADE_HERE = frozenset({"layers_as_planned", "codes_as_chosen", "remaining_shortcuts"})
NOT_RUN = "the file was not run"
NO_FLOATS = "there are no float weights off a grid to look at"
SPOKEN_OF = (
    "anything else",
    "accuracy_drop",
    "agreement",
    "attack_success",
    "runtime_agreement",
    "source_differences",
)


@dataclass(frozen=True, slots=True)
class Findings:
    """What there is to be judged."""

    origin: Origin
    classes: int
    evidence: Evidence
    measured: Measured
    scan: Scan  # of the float weights
    static: tuple[Finding, ...]  # of the file
    provenance: Provenance | None = None  # None: there is no float model
    known: AbstractSet[LayerDigest] = frozenset()
    calibration: Calibration | None = None  # None, as the next two: the file was made elsewhere
    plan: tuple[LayerPlan, ...] = ()
    made: LayersAsMade | None = None
    cleaning: Cleaning | None = None


def compose(
    request: Request, findings: Findings, clock: Clock, run_id: str, recipe: Recipe | None = None
) -> Report:
    """The whole report but for the place of the output.

    Args:
        recipe: By which the file was made, if it was made here.
    """
    measured, evidence, calibration = findings.measured, findings.evidence, findings.calibration
    made, provenance = findings.made, findings.provenance
    gate = request.policy.gate
    objected = objections(evidence, measured.rates, findings.classes, gate)
    checks, required = sound(_checks(request, findings), objected), _required(gate, findings)
    outcome, absent = judge(checks, required), {**_absent(request, findings), **objected}
    spoken_of = required if measured.files else frozenset()  # of a file that was not run, nothing
    reasons = explain(checks, spoken_of, absent=absent)
    if calibration is not None and calibration.synthetic is not None:
        reasons += (f"calibrated on images made from the model itself ({calibration.synthetic})",)
        outcome = Outcome.NO_VERDICT if outcome is Outcome.ACCEPT else outcome
    names = _class_names(request)
    traced = provenance.layers if provenance is not None else ()
    return Report(
        run_id=run_id,
        started=clock.started,
        versions={"qdeploy": __version__, **installed_versions()},
        command=request.command,
        origin=findings.origin,
        recipe=recipe.model_dump(mode="json") if recipe is not None else None,
        policy=request.policy.model_dump(mode="json"),
        device=request.device.model_dump(mode="json"),
        data=(*(calibration.used if calibration is not None else ()), *evidence.used),
        stages=tuple(StageTime(name, seconds) for name, seconds in clock.times),
        plan=findings.plan,
        layers=tuple(made.layers) if made is not None else (),
        left_float=tuple(made.left_float) if made is not None else (),
        files=measured.files,
        classes=names or tuple(map(str, range(findings.classes))),
        rates=measured.rates,
        runtimes=measured.runtimes,
        latencies=measured.latencies,
        checks=checks,
        required=frozenset(required),
        outcome=outcome,
        reasons=reasons,
        not_measured=_not_measured(checks, absent),
        notes=(
            *_cleaning_notes(findings.cleaning, names),
            *_notes(request, evidence),
            *_waiver_notes(request, findings),
            *evidence.notes,
            *_fingerprint_notes(findings.scan),
        ),
        fingerprints=findings.scan.fingerprints,
        findings=findings.static,
        provenance=provenance,
        explanations={x.name: explanation(x, findings.known) for x in traced},
        samples=measured.samples,
        cleaning=findings.cleaning,
        output=None,
    )


def _class_names(request: Request) -> tuple[str, ...]:
    card = request.sources.card
    return tuple(card.model.classes or ()) if card is not None else ()


def _checks(request: Request, findings: Findings) -> tuple[Check, ...]:
    gate, measured, provenance = request.policy.gate, findings.measured, findings.provenance
    sizes = {f.variant: f.size_bytes for f in measured.files}
    budget = request.device.budget
    return (
        check_static(findings.static, gate),
        *check_rates(measured.rates, gate),
        *check_runtimes(measured.runtimes, gate),
        *check_batches(measured.batches, gate),
        *(check_layers(findings.made, gate) if findings.made is not None else ()),
        *(check_provenance(provenance, findings.known, gate) if provenance is not None else ()),
        *check_crowding(findings.scan, gate),
        *check_cleaning(findings.cleaning, _class_names(request), gate),
        *(check_budget(sizes["result"], measured.latencies, budget, gate) if sizes else ()),
    )


def _required(gate: GateSpec, findings: Findings) -> frozenset[str]:
    """What the policy requires of this file: checks of our own making only of our own files."""
    with_trigger = gate.required_with_trigger if findings.evidence.triggers else frozenset()
    return (gate.required | with_trigger) - (MADE_HERE if findings.made is None else frozenset())


def _absent(request: Request, findings: Findings) -> dict[str, str]:
    """Why a check that is not there could not be made."""
    if not findings.measured.files:
        return {"anything else": NOT_RUN}
    no_test = "no test data" if findings.evidence.images is None else None
    alone = None if findings.provenance is not None else "no reference is known"
    no_trigger = no_test or (None if findings.evidence.triggers else "no trigger is known")
    runtimes = "the device profile names one runtime"
    one_runtime = runtimes if len(request.device.runtimes) == 1 else None
    no_limit, no_budget = "the policy sets no limit", "neither device nor policy sets a budget"
    gate, budget, traced = request.policy.gate, request.device.budget, findings.provenance
    not_traced = alone or (traced.not_compared if traced is not None else None)
    no_integers = not_traced or "the file holds no integers"
    reasons = {
        "accuracy": no_test or no_limit,
        "accuracy_drop": no_test or alone,
        "accuracy_drop_relative": no_test or alone or no_limit,
        "class_drop": no_test or alone or no_limit,
        "agreement": no_test or alone,
        "attack_success": no_trigger,
        "attack_success_rise": no_trigger or alone,
        "runtime_agreement": no_test or one_runtime,
        "source_differences": not_traced,
        "weight_steps": no_limit if gate.max_weight_steps is None else no_integers,
        "bias_shift": no_limit if gate.max_bias_shift is None else no_integers,
        "unexplained_rounding": no_limit if gate.max_unexplained_rounding is None else no_integers,
        "cell_crowding": no_limit if gate.max_cell_crowding is None else NO_FLOATS,
        "remaining_shortcuts": "no sanitizer looked for shortcuts",
        "file_bytes": no_budget,
        "latency_ms": no_budget if budget.latency_ms is None else "no run was timed",
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _not_measured(checks: tuple[Check, ...], absent: Mapping[str, str]) -> tuple[str, ...]:
    """What the evidence does not speak of, though a reader might take it for granted."""
    made = {check.name for check in checks}
    names = (name for name in SPOKEN_OF if name not in made and name in absent)
    return tuple(f"{name}: {absent[name]}" for name in names)


def _cleaning_notes(cleaning: Cleaning | None, names: Sequence[str]) -> tuple[str, ...]:
    if cleaning is None:
        return ()

    kind, images = cleaning.sanitizer["kind"], cleaning.images
    done = (
        f"cleaned by {kind} on {images.images:,} images of {images.name}: answers as before on"
        f" {cleaning.agreement:.1f} % of them"
    )
    if cleaning.suspicious is None or cleaning.remaining is None:
        return (done,)
    return (
        done,
        f"classes that a universal perturbation reached too easily:"
        f" {named_classes(cleaning.suspicious, names)}; after cleaning:"
        f" {named_classes(cleaning.remaining, names)}",
    )


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


def _waiver_notes(request: Request, findings: Findings) -> Iterator[str]:
    """Who answers for what does not stand against the file, and what has ended."""
    made = findings.made
    names = {
        "finding": [f.rule for f in findings.static if f.level == "error"],
        "float": [layer.name for layer in made.left_float] if made is not None else [],
        "degraded": [layer.name for layer in made.layers if layer.degraded] if made else [],
    }
    for waiver in request.policy.gate.waivers:
        used = any(map(waiver.covers, names[waiver.kind]))
        yield f"{waiver}: {waiver.reason}" if used else f"{waiver}: not needed for this file"
    yield from (f"{waiver}: it has ended, and waives nothing" for waiver in request.ended)


def _notes(request: Request, evidence: Evidence) -> tuple[str, ...]:
    """Whose word the evidence is: a card comes from the model's author, who may be the attacker."""
    roles = dict.fromkeys(data.role for data in evidence.used if data.given_by == CARD)
    things = " and ".join({"test": "test data"}.get(role, role) for role in roles)
    card = request.sources.card
    unfit = misfit(request.device)
    notes = [unfit] if unfit is not None else []
    if things:
        notes.append(f"{things}: as named by the model's own card, {request.sources.card_path}")
    if card is not None and card.poisoned is not None:
        notes.append(f"the card says that the model is poisoned on purpose: {card.poisoned.attack}")
    return tuple(notes)
