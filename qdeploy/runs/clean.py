"""Clean a model file: a student file that answers as it does, and what is told of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import jit

from qdeploy import __version__
from qdeploy.cleaning.curves import draw_distillation
from qdeploy.cleaning.distil import Distilled, Setting, Surveyed, distill
from qdeploy.data import Images, open_images
from qdeploy.disk.files import require_writable, set_aside, write_atomically
from qdeploy.errors import UsageError
from qdeploy.inputs.requests import CleanRequest
from qdeploy.machine import installed_versions
from qdeploy.progress import Clock, Progress
from qdeploy.runs.opening import open_source
from qdeploy.runs.run_id import data_facts, facts_digest, input_facts, run_id
from qdeploy.runs.rundir import open_run
from qdeploy.runs.student_card import card_beside
from qdeploy.runs.writing import as_json
from qdeploy.settings.sanitizers import Sanitizer
from qdeploy.training.checkpoint import Checkpoint
from qdeploy.training.compute import Compute, computing
from qdeploy.training.write import write_script, write_state
from qdeploy.values import Cleaning, DataUsed, Loaded, Origin, named_classes

TRAINING = "training.pt"
LOG, CURVES, CARD = ".json", ".svg", ".toml"  # beside the student, by its name


@dataclass(frozen=True, slots=True)
class Student:
    """A student on disk, and what is known of it."""

    path: Path
    origin: Origin  # of the teacher
    result: Distilled
    classes: tuple[str, ...]  # names, where the card has them
    images: DataUsed
    hashes: frozenset[bytes]  # of these images
    seconds: float
    written: tuple[Path, ...]
    spec: Sanitizer

    def cleaning(self) -> Cleaning:
        """What the report says of it."""
        result, surveyed = self.result, self.result.surveyed
        return Cleaning(
            origin=self.origin,
            sanitizer=self.spec.model_dump(mode="json"),
            images=self.images,
            student=str(self.path),
            epochs=len(result.history),
            suspicious=None if surveyed is None else surveyed.suspects,
            remaining=None if surveyed is None else surveyed.remaining,
            agreement=result.agreement,
            seconds=self.seconds,
        )

    def lines(self) -> Iterator[tuple[str, str]]:
        """What a person wants to know, as pairs of a name and a text."""
        result = self.result
        yield "student", str(self.path)
        how = f"{self.spec.kind}, schedule {self.spec.schedule}"
        yield "made by", f"{how}, {self.images.images} images"
        if result.surveyed is not None:
            yield from _found(result.surveyed, self.classes)
        if result.history:
            yield "epochs", f"{len(result.history)}, kept number {result.best_epoch + 1}"
            yield "KD loss", f"{result.history[result.best_epoch].kd:.4f}"
        if result.watched:
            yield "watched", ", ".join(result.watched)
        yield "agreement", f"{result.agreement:.2f} % with the teacher on these images"
        yield "seconds", f"{self.seconds:.1f}"
        yield from (("wrote", str(path)) for path in self.written)
        yield "next", "not judged: qdeploy sanitize quantizes and measures it"


def make_student(request: CleanRequest, compute: Compute, progress: Progress) -> Student:
    """The student that `request` describes, with card, log and plot beside it.

    Other processes that compute together with this one call `assist`.

    Raises:
        UsageError: the student would take its teacher's place, or nothing says what inputs are.
        InputError: the model or an image is not valid.
        PlanError: the model is of a form that cannot be distilled.
        OutputError: a place cannot be written to.
    """
    began = time.monotonic()
    _check_places(request)
    clock = Clock(progress)
    seed = compute.same(request.seed)  # a private one is each process' own
    request = replace(request, seed=seed)
    with clock.stage("load"):
        loaded, images = _opened(request)
    with clock.stage("data"):
        images, hashes = images.decoded(progress)
        digest = images.digest(hashes)
        used = DataUsed("distillation", images.name, len(images), digest, "command line")
    asked = _asked(request, compute, loaded)
    decided = facts_digest({**asked, "data": data_facts((used,))})
    with open_run(request.artifacts, run_id(decided), decided) as run:
        store = Checkpoint(
            run.path / TRAINING, decided
        )  # stays: asked again, it need not be done again
        with clock.stage("clean"):
            setting = Setting(seed=request.seed, compute=compute, store=store, progress=progress)
            result = distill(loaded, images, request.spec, setting)
        seconds = time.monotonic() - began
        log = as_json({**_head(request), **asked, **_outcome(used, result, seconds)})
        run.write("cleaning.json", log)
        written = _deliver(request, result, log)
        run.seal()
    names = tuple(request.sources.card.model.classes or ()) if request.sources.card else ()
    return Student(
        request.out, loaded.origin, result, names, used, frozenset(hashes), seconds, written,
        request.spec,
    )  # fmt: skip


def assist(request: CleanRequest, compute: Compute) -> None:
    """Do this process' part of a student that the main one makes; nothing is written.

    Raises:
        As `make_student`.
    """
    request = replace(request, seed=compute.same(request.seed))
    loaded, images = _opened(request)
    distill(loaded, images, request.spec, Setting(seed=request.seed, compute=compute))


def clean_alone(request: CleanRequest, progress: Progress) -> Student:
    """`make_student` in one process alone.

    Raises:
        As `make_student`.
    """
    with computing(request.accelerator) as compute:
        if compute.world > 1:
            raise UsageError(
                "sanitize runs in one process",
                hint="start qdeploy clean with torchrun, and sanitize its student alone",
            )
        return make_student(request, compute, progress)


def _found(surveyed: Surveyed, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Which classes were reached too easily, and whether they still are."""
    yield "suspicious", named_classes(surveyed.suspects, names)
    for c in surveyed.suspects:
        for before, after in zip(surveyed.teacher, surveyed.student, strict=True):
            change = f"{before.radii[c]:.2f} -> {after.radii[c]:.2f} {before.unit}"
            yield f"  {named_classes((c,), names)}", f"{change}, median {before.median:.2f}"
    yield "remaining", named_classes(surveyed.remaining, names)


def _opened(request: CleanRequest) -> tuple[Loaded, Images]:
    images = open_images(request.images, request.sources.preprocessing, request.sources.data_roots)
    loaded = open_source(request.sources, run_code_from_model=request.run_code_from_model)
    return loaded, images.sample(request.image_count, request.seed)


def _deliver(request: CleanRequest, result: Distilled, log: bytes) -> tuple[Path, ...]:
    """Write card, log and plot, and the student last: there is none without them."""
    beside: dict[Path, bytes] = {request.out.with_suffix(LOG): log}
    card = card_beside(request.sources, request.out)
    if card is not None:
        place = request.out.with_suffix(CARD)
        if place.exists() and place.read_bytes() != card:
            set_aside(place)
        beside[place] = card
    curves = draw_distillation(result)
    if curves is not None:
        beside[request.out.with_suffix(CURVES)] = curves
    for path, data in beside.items():
        write_atomically(path, data)
    if isinstance(result.module, jit.ScriptModule):
        write_script(request.out, result.module)
    else:
        write_state(request.out, result.module)
    return tuple(beside)


def _check_places(request: CleanRequest) -> None:
    model, out = request.sources.model, request.out
    if out.suffix in {LOG, CURVES, CARD, ""}:
        raise UsageError(f"--out {out}: give the student a name that ends in .pt")
    if request.sources.card_path is not None and model.with_suffix("") == out.with_suffix(""):
        raise UsageError(
            f"--out {out}: its card would take the place of the model's",
            hint="give the student another name",
        )
    require_writable(out)


def _asked(request: CleanRequest, compute: Compute, loaded: Loaded) -> dict[str, Any]:
    """Everything besides the images that changes the student."""
    named = request.sources.architecture
    return {
        "model": loaded.origin.sha256,
        "architecture": None if named is None else [named[0], dict(named[1])],
        "input": input_facts(request.sources),
        "sanitizer": request.spec.model_dump(mode="json"),
        "seed": request.seed,
        "compute": compute.facts(mixed=loaded.kind != "script"),
    }


def _head(request: CleanRequest) -> dict[str, Any]:
    return {
        "versions": {"qdeploy": __version__, **installed_versions()},
        "command": request.command,
        "path": str(request.sources.model),
    }


def _outcome(used: DataUsed, result: Distilled, seconds: float) -> dict[str, Any]:
    """With which images, and how it went."""
    return {
        "images": asdict(used),
        "watched": result.watched,
        "survey": None if result.surveyed is None else asdict(result.surveyed),
        "best_epoch": result.best_epoch,
        "agreement": result.agreement,
        "seconds": seconds,
        "epochs": [asdict(epoch) for epoch in result.history],
    }
