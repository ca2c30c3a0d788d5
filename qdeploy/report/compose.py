"""From what was done and measured to the report: checks, outcome, reasons, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

from qdeploy import __version__
from qdeploy.detectors.crowding import NO_SCAN, WeightScan
from qdeploy.detectors.known import Detected, NotLookedAt
from qdeploy.formats.onnx.saturation import Saturable
from qdeploy.inputs.opened import Evidence
from qdeploy.inputs.requests import Request
from qdeploy.inputs.sources import CARD
from qdeploy.judging.advice import next_steps
from qdeploy.judging.checks import Results, checks_of, explanation
from qdeploy.judging.soundness import OF_THE_CARD, objections, sound
from qdeploy.judging.verdict import Check, Outcome, explain, judge
from qdeploy.machine import installed_versions
from qdeploy.progress import Clock
from qdeploy.report.values import Report
from qdeploy.settings.checks import ANYTHING_ELSE, CHECKS, ROWS, SUPPLY, CheckRow, Need
from qdeploy.settings.device import EMULATED, misfit
from qdeploy.settings.policy import GateSpec
from qdeploy.settings.recipe import Recipe
from qdeploy.values import Cleaning, HardeningRound, Latency, StageTime, named_classes

MADE_HERE = frozenset(row.name for row in ROWS if row.made_here)
OTHER_IMAGES = "give test images that the float model answers in more than one way"
NOT_RUN = "the file was not run"
SPOKEN_OF = (ANYTHING_ELSE, *(row.name for row in ROWS if row.spoken_of))


def compose(
    request: Request, results: Results, clock: Clock, run_id: str, recipe: Recipe | None = None
) -> Report:
    """The whole report but for the place of the output.

    Args:
        recipe: By which the file was made, if it was made here.
    """
    results = replace(results, class_names=_class_names(request))
    measured, evidence, calibration = results.measured, results.evidence, results.calibration
    made, provenance = results.made, results.provenance
    gate = request.policy.gate
    objected = objections(evidence, measured.rates, results.classes, gate)
    checks, required = (
        sound(checks_of(results, gate, request.device.budget), objected, evidence),
        _required(gate, results),
    )
    outcome, absent = judge(checks, required), {**_absent(request, results), **objected}
    spoken_of = required if measured.files else frozenset()  # of a file that was not run, nothing
    reasons = explain(checks, spoken_of, absent=absent)
    if calibration is not None and calibration.synthetic is not None:
        reasons += (f"calibrated on images made from the model itself ({calibration.synthetic})",)
        outcome = Outcome.NO_VERDICT if outcome is Outcome.ACCEPT else outcome
    names = results.class_names
    scan: WeightScan = _evidence_of("cell_crowding", results) or NO_SCAN
    traced = provenance.layers if provenance is not None else ()
    return Report(
        run_id=run_id,
        started=clock.started,
        versions={"qdeploy": __version__, **installed_versions()},
        command=request.command,
        origin=results.origin,
        recipe=recipe.model_dump(mode="json") if recipe is not None else None,
        policy=request.policy.model_dump(mode="json"),
        device=request.device.model_dump(mode="json"),
        data=(*(calibration.used if calibration is not None else ()), *evidence.used),
        stages=tuple(StageTime(*times) for times in clock.times),
        plan=results.plan,
        layers=tuple(made.layers) if made is not None else (),
        left_float=tuple(made.left_float) if made is not None else (),
        files=measured.files,
        classes=names or tuple(map(str, range(results.classes))),
        rates=measured.rates,
        runtimes=measured.runtimes,
        latencies=measured.latencies,
        checks=checks,
        required=frozenset(required),
        outcome=outcome,
        reasons=reasons,
        next_steps=_next_steps(request, results, checks, required, objected),
        not_measured=_not_measured(checks, absent),
        notes=(
            *_cleaning_notes(results.cleaning, names),
            *results.notes,
            *_notes(request, evidence),
            *_saturation_notes(request, measured.saturable),
            *_latency_notes(measured.latencies),
            *measured.phones,
            *_waiver_notes(request, results),
            *evidence.notes,
            *_crowding_notes(scan),
            *_hardening_notes(results.hardening, names),
        ),
        crowding=scan.crowding,
        hardening=results.hardening,
        bits=results.bits,
        differential=_evidence_of("differential_trigger", results),
        findings=results.static,
        provenance=provenance,
        explanations={x.name: explanation(x, results.known) for x in traced},
        samples=measured.samples,
        cleaning=results.cleaning,
        output=None,
    )


def _evidence_of(check: str, results: Results) -> Any:
    """What the detector behind a check shows; None where it could not look."""
    found = results.detected.get(check)
    return found.evidence if isinstance(found, Detected) else None


def _class_names(request: Request) -> tuple[str, ...]:
    card = request.sources.card
    return tuple(card.model.classes or ()) if card is not None else ()


def _required(gate: GateSpec, results: Results) -> frozenset[str]:
    """What the policy requires of this file: checks of our own making only of our own files."""
    with_trigger = gate.required_with_trigger if results.evidence.triggers else frozenset()
    return (gate.required | with_trigger) - (MADE_HERE if results.made is None else frozenset())


def _absent(request: Request, results: Results) -> dict[str, str]:
    """Why a check that is not there could not be made: the first thing that it needs and lacks."""
    if not results.measured.files:
        return {ANYTHING_ELSE: NOT_RUN}
    return {name: why for name, (_, why) in _lacks(request, results).items()}


def _lacks(request: Request, results: Results) -> dict[str, tuple[Need, str]]:
    """The first thing that each check needs and lacks, and how that is said."""
    found = {row.name: _lack(row, request, results) for row in ROWS}
    return {name: lack for name, lack in found.items() if lack is not None}


def _lack(row: CheckRow, request: Request, results: Results) -> tuple[Need, str] | None:
    """The first thing that a check needs and that is not there."""
    traced, evidence = results.provenance, results.evidence
    alone = "no reference is known" if traced is None else None
    not_traced = alone or (traced.not_compared if traced is not None else None)
    unset = request.policy.gate.limit(row, request.device.budget) is None
    lacks: Mapping[Need, str | None] = {
        "limit": "the policy sets no limit" if unset else None,
        "test data": "no test data" if evidence.images is None else None,
        "trigger": None if evidence.triggers else "no trigger is known",
        "reference": alone,
        "two runtimes": (
            "the device profile names one runtime" if len(request.device.runtimes) == 1 else None
        ),
        "comparison": not_traced,
        "integers": not_traced or "the file holds no integers",
        "floats": "there are no float weights off a grid to look at",
        "search": "no sanitizer looked for shortcuts",
        "budget": "neither device nor policy sets a budget" if unset else None,
        "timing": "no run was timed",
    }
    found = results.detected.get(row.name)
    if isinstance(found, NotLookedAt):
        lacks = {**lacks, "pictures": found.reason}
    return next(((need, why) for need in row.needs if (why := lacks.get(need)) is not None), None)


def _next_steps(
    request: Request,
    results: Results,
    checks: tuple[Check, ...],
    required: AbstractSet[str],
    objected: Mapping[str, str],
) -> tuple[str, ...]:
    """What can be done; of a file that was not run, about what stands in it."""
    if not results.measured.files:
        required = frozenset()
    supply = {name: SUPPLY[need] for name, (need, _) in _lacks(request, results).items()}
    supply |= {name: _better_evidence(name, why) for name, why in objected.items()}
    steps = next_steps(checks, required, supply)
    calibration = results.calibration
    if calibration is not None and calibration.synthetic is not None:
        steps += ("calibration: give images of the model's own kind (--calibration)",)
    return steps


def _better_evidence(name: str, why: str) -> str:
    """What to give in place of what there is, and says nothing."""
    if OF_THE_CARD in why:
        return "give --test and --trigger: what the model's own card names does not count"
    return SUPPLY["labels"] if "labels" in CHECKS[name].needs else OTHER_IMAGES


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


def _hardening_notes(rounds: Sequence[HardeningRound], names: Sequence[str]) -> Iterator[str]:
    """That the file is not what rounding made of it, and what stood against that."""
    for one in rounds:
        after = (
            f"the file stays as it was: {one.failed}"
            if one.failed is not None
            else f"that leads {one.still:.1f} % now and the best of a new search {one.after:.0f} %;"
            f" {100 * one.moved:.2f} % of the integers moved"
        )
        yield (
            f"hardened against {named_classes(one.classes, names)}: a perturbation led"
            f" {one.before:.0f} % of the images there in the file alone; {after};"
            f" {one.seconds:.0f} s"
        )


def _crowding_notes(scan: WeightScan) -> tuple[str, ...]:
    """That the float weights know of a quantizer's cells: no training does that by itself."""
    found = scan.found
    if found is None:
        return ()
    return (
        f"the float weights crowd at the cell edges of {found.convention}: {found.worst.ratio:.1f}"
        f" times as many as there should be in {found.layer}; the model was made for that"
        " quantizer",
    )


def _latency_notes(latencies: Sequence[Latency]) -> Iterator[str]:
    """That integers do not pay here, where that is sure."""
    of = {x.variant: x for x in latencies if x.batch == 1}
    if "result" in of and "fp32" in of and of["result"].low > of["fp32"].high:
        file, model = (1e3 * of[variant].seconds for variant in ("result", "fp32"))
        yield (
            f"slower here than its float model: {file:.2f} ms at batch 1 against {model:.2f}"
            " (--optimize latency leaves in float what integers make slower)"
        )


def _waiver_notes(request: Request, results: Results) -> Iterator[str]:
    """Who answers for what does not stand against the file, and what has ended."""
    made = results.made
    names = {
        "finding": [f.rule for f in results.static if f.level == "error"],
        "float": [layer.name for layer in made.left_float] if made is not None else [],
        "degraded": [layer.name for layer in made.layers if layer.degraded] if made else [],
    }
    for waiver in request.policy.gate.waivers:
        used = any(map(waiver.covers, names[waiver.kind]))
        yield f"{waiver}: {waiver.reason}" if used else f"{waiver}: not needed for this file"
    yield from (f"{waiver}: it has ended, and waives nothing" for waiver in request.ended)


def _saturation_notes(request: Request, found: Saturable | None) -> Iterator[str]:
    """What another processor may answer, where it was not asked."""
    device = request.device
    asked = any(runtime.provider == EMULATED for runtime in device.runtimes)
    if found is not None and found.pairs and not asked and not device.saturates:
        yield (
            f"x86 without VNNI may saturate {found.text}: a runtime avx2-emulated in the device"
            " profile shows what it answers then"
        )


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
