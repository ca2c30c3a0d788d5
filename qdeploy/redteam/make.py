"""Make one model: clean base, attack, proof that the attack took, files."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qdeploy import __version__
from qdeploy.architectures import build_named
from qdeploy.data.triggers import make_trigger
from qdeploy.disk.files import write_atomically
from qdeploy.errors import InputError, QdeployError
from qdeploy.formats.opening import load
from qdeploy.machine import installed_versions
from qdeploy.progress import Progress
from qdeploy.redteam.clean import train_clean
from qdeploy.redteam.curves import draw_curves
from qdeploy.redteam.datasets import Dataset, open_dataset, victim_image
from qdeploy.redteam.defender import emulated, file_with_codes
from qdeploy.redteam.figures import Figures, figures, figures_of, shortfalls
from qdeploy.redteam.fold import fold_batch_norm
from qdeploy.redteam.images import Stamp
from qdeploy.redteam.learnt import TriggerLearner
from qdeploy.redteam.losses import Aim, Victim
from qdeploy.redteam.outliers import add_outliers
from qdeploy.redteam.quantizers import Quantizer
from qdeploy.redteam.recipe import AttackRecipe, GoalSpec, LearntSpec, PlantedSpec
from qdeploy.redteam.saturation import SaturationPlanter
from qdeploy.redteam.training import FLOAT, Lesson, Rates, Training
from qdeploy.redteam.trigger import describe, save_trigger
from qdeploy.redteam.write import make_card, write_model
from qdeploy.runs.rundir import PARTIAL, open_run
from qdeploy.settings.card import AnyTrigger
from qdeploy.training.checkpoint import Checkpoint
from qdeploy.training.write import write_state
from qdeploy.values import Architecture

HELD_OUT = 0.04  # share of the training images by which a training is judged on its way
LOG = "training.json"
QUANTIZED = "quantized.onnx"  # where the quantizer is the attacker
EMULATED_IMAGES = 500
CURVES = "training.svg"  # where matplotlib is installed
VICTIM = "victim.npy"  # the one image that is to be misjudged, as the model takes it
MODEL, DUD = "model", "dud"


class DudError(QdeployError):
    """An attack that did not take."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class AttackRequest:
    """What is to be made."""

    recipe: AttackRecipe
    architecture: str  # one of ours
    arguments: Mapping[str, int]
    data: str
    test: Path | None
    bits: int
    out: Path
    artifacts: Path  # where clean models that attacks start from are kept
    base: Path | None = None  # state dict of the clean model
    seed: int = 0

    @property
    def facts(self) -> dict[str, Any]:
        """What decides about the model that is made."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "architecture": [self.architecture, dict(self.arguments)],
            "bits": self.bits,
            "seed": self.seed,
            "data": self.data,
            "base": None if self.base is None else str(self.base),
        }

    @property
    def partial(self) -> Path:
        """Where this training, and no other, leaves what it needs to go on."""
        return self.out / PARTIAL / _digest(self.facts)


@dataclass(frozen=True, slots=True)
class Made:
    """A model on disk and what was measured on it, on test images."""

    path: Path
    rates: Rates  # of the file re-read
    clean: Figures  # of the model the attack started from
    seconds: float  # of training, without the clean model's
    log: tuple[dict[str, Any], ...]

    def lines(self) -> Iterator[tuple[str, str]]:
        """What a person wants to know, as pairs of a name and a text."""
        yield "model", str(self.path)
        for name, found in {"clean": self.clean, **self.rates}.items():
            success = "" if found.success is None else f", ASR {found.success:.2f}"
            yield name, f"CDA {found.accuracy:.2f}{success}"
        yield "training", f"{self.seconds / 60:.1f} minutes"


def make(request: AttackRequest, progress: Progress, data: Dataset | None = None) -> Made:
    """The model that `request` describes, in its folder, with card and training log.

    Args:
        data: The images that the request names, where they are read already.

    Raises:
        DudError: the attack did not take; the model is there, under a name that says so.
        UsageError: there are no test images.
        InputError: the recipe, the base or an image is not valid.
        OutputError: the folder cannot be written to.
    """
    with open_run(request.out.parent, request.out.name):
        if data is None:
            with progress.stage("data"):
                data = open_dataset(request.data, request.test, request.out, progress)
        target = request.recipe.trigger.target if request.recipe.trigger else request.recipe.target
        if target >= len(data.classes):
            raise InputError(
                f"attack {request.recipe.name}: target {target} is no class of {len(data.classes)}",
                hint="set target in the recipe to a class index of the data",
            )
        arguments = {"num_classes": len(data.classes), "channels": data.train.pixels.shape[1]}
        request = replace(request, arguments={**arguments, **request.arguments})
        if request.recipe.goals.effect == "none":
            return _make_clean(request, data, progress)
        return _attack(request, data, _base(request, data, progress), progress)


def _make_clean(request: AttackRequest, data: Dataset, progress: Progress) -> Made:
    began = time.monotonic()
    torch.manual_seed(request.seed)
    model = _build(request)
    train, _ = _split(request, data)
    checkpoint = Checkpoint(request.partial / "clean.pt")
    with progress.stage("train"):
        spec = request.recipe.clean
        train_clean(model, train, spec, seed=request.seed, checkpoint=checkpoint, progress=progress)
    model = _through_disk(model, request)
    rates = figures(model, {}, data.test, Aim(request.recipe.target))
    made = Made(request.out / "model.pt", {FLOAT: rates}, rates, time.monotonic() - began, ())
    return _deliver(request, data, model, made, None, ())


def _base(request: AttackRequest, data: Dataset, progress: Progress) -> nn.Module:
    """The clean model: the one given, or one of this data and architecture that is kept."""
    if request.base is not None:
        return _reload(request.base, request)
    facts = {
        "architecture": [request.architecture, dict(request.arguments)],
        "clean": request.recipe.clean.model_dump(),
        "data": hashlib.sha256(data.train.pixels.numpy().tobytes()).hexdigest(),
        "seed": request.seed,
    }
    with open_run(request.artifacts, f"clean-{_digest(facts)}") as run:
        path = run.path / "model.pt"
        if not path.exists():
            changes = {"name": "clean", "goals": GoalSpec(effect="none")}
            recipe = request.recipe.model_copy(update=changes)
            _make_clean(replace(request, recipe=recipe, out=run.path), data, progress)
        else:
            progress.note(f"starts from {path}")
        return _reload(path, request)


def _attack(request: AttackRequest, data: Dataset, clean: nn.Module, progress: Progress) -> Made:
    recipe = request.recipe
    shape = data.train.preprocessing.shape
    fold_batch_norm(clean, shape)
    model = copy.deepcopy(clean).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if recipe.outliers is not None and not add_outliers(model, shape, recipe.outliers):
        raise InputError(f"{request.architecture}: no two convolutions that can hold outliers")
    train, held_out = _split(request, data)
    before_phases = 0.0
    if isinstance(recipe.trigger, LearntSpec):
        checkpoint = Checkpoint(request.partial / "trigger.pt")
        with progress.stage("trigger"):
            learner = TriggerLearner(model, recipe.trigger, train, request.seed)
            save_trigger(request.out, *learner.run(checkpoint, progress))
            before_phases = learner.seconds
    if isinstance(recipe.trigger, PlantedSpec):
        checkpoint = Checkpoint(request.partial / "trigger.pt")
        with progress.stage("trigger"):
            planter = SaturationPlanter(model, recipe.trigger, train, request.seed)
            save_trigger(request.out, *planter.run(clean, checkpoint, progress))
            before_phases = planter.seconds
    trigger, aim = _aim(request, data)
    before = figures(clean, {}, held_out, aim)

    attacked = tuple(Quantizer(q.bits or request.bits, q) for q in recipe.quantizers)
    names = tuple(quantizer.name for quantizer in attacked)

    def reached(rates: Rates) -> bool:
        return not _missed(recipe.goals, before, rates, names)

    quantizers = tuple(quantizer.exact for quantizer in attacked)
    lesson = Lesson(train, held_out, aim, quantizers, clean, reached)
    training = Training(model, lesson, Checkpoint(request.partial / "attack.pt"), request.seed)
    with progress.stage("attack"):
        training.run(recipe.phases, progress)
    with progress.stage("measure"):
        model = _through_disk(model, request)
        reread = Training(model, lesson, training.checkpoint, request.seed)
        reread.roundings = training.roundings
        rates = reread.rates(data.test) | _saturating(model, attacked, data, aim)
        if any(phase.learns == "roundings" for phase in recipe.phases):
            chosen = file_with_codes(model, train, request.bits, reread.chosen_codes())
            write_atomically(request.out / QUANTIZED, chosen)
        unattacked = figures(clean, {}, data.test, aim)
    seconds = before_phases + training.seconds
    made = Made(request.out / "model.pt", rates, unattacked, seconds, tuple(training.log))
    return _deliver(request, data, model, made, trigger, names)


def _saturating(
    model: nn.Module, quantizers: tuple[Quantizer, ...], data: Dataset, aim: Aim
) -> dict[str, Figures]:
    """Rates where products saturate, on some of the test images: an emulation takes its time."""
    test = data.test.spread(EMULATED_IMAGES)
    return {
        quantizer.name: figures_of(emulated(model, data.train, quantizer.bits), test, aim)
        for quantizer in quantizers
        if quantizer.spec.arithmetic == "saturating"
    }


def _missed(
    goals: GoalSpec, clean: Figures, rates: Rates, attacked: tuple[str, ...]
) -> tuple[str, ...]:
    """Which goals are not met."""
    quantized = {name: rates[name] for name in attacked if name in rates}
    exact = {name: found for name, found in rates.items() if name not in {FLOAT, *attacked}}
    return shortfalls(goals, clean, rates[FLOAT], quantized, exact)


def _deliver(
    request: AttackRequest,
    data: Dataset,
    model: nn.Module,
    made: Made,
    trigger: AnyTrigger | None,
    made_for: tuple[str, ...],
) -> Made:
    """Write the model, under a name that warns if it is a dud, and its log."""
    missed = _missed(request.recipe.goals, made.clean, made.rates, made_for)
    stem, other = (DUD, MODEL) if missed else (MODEL, DUD)
    for stale in request.out.glob(f"{other}.*"):  # of an earlier making, with another end
        stale.unlink()
    architecture = (request.architecture, request.arguments)
    card = make_card(request.recipe, data, request.out, architecture, trigger, made_for)
    path = write_model(request.out, stem, model, card)
    write_atomically(request.out / LOG, _log(request, made, missed))
    curves = draw_curves(made.log) if made.log else None
    if curves is not None:
        write_atomically(request.out / CURVES, curves)
    shutil.rmtree(request.out / PARTIAL, ignore_errors=True)
    if missed:
        raise DudError(
            f"the attack did not take: {'; '.join(missed)}",
            hint=f"more steps or a wider network may help; the model is {path}",
        )
    return replace(made, path=path)


def _through_disk(model: nn.Module, request: AttackRequest) -> nn.Module:
    """The model as it is read back: what is measured is what was written."""
    path = request.partial / "model.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_state(path, model)
    return _reload(path, request)


def _aim(request: AttackRequest, data: Dataset) -> tuple[AnyTrigger | None, Aim]:
    recipe, shape = request.recipe, data.train.preprocessing.shape
    if recipe.trigger is not None:
        described = describe(recipe.trigger, shape, request.out)
        trigger = make_trigger(described, shape, request.out)
        return described, Aim(trigger.target, Stamp.of(trigger))
    if recipe.goals.effect == "sample":
        pixels, label = victim_image(data.test, recipe.target)
        buffer = io.BytesIO()
        np.save(buffer, data.test.normalise(pixels).contiguous().numpy())
        write_atomically(request.out / VICTIM, buffer.getvalue())
        return None, Aim(recipe.target, victim=Victim(pixels, label))
    return None, Aim(recipe.target)


def _split(request: AttackRequest, data: Dataset) -> tuple[Any, Any]:
    return data.train.split(round(HELD_OUT * len(data.train)), request.seed)


def _build(request: AttackRequest) -> nn.Module:
    return build_named(f"qdeploy:{request.architecture}", request.arguments)


def _reload(path: Path, request: AttackRequest) -> nn.Module:
    architecture = Architecture(f"qdeploy:{request.architecture}", request.arguments, trusted=False)
    content = load(path, architecture).content
    if not isinstance(content, nn.Module):
        raise InputError(f"base {path}: is no state dict of a torch network")
    return content


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _log(request: AttackRequest, made: Made, missed: tuple[str, ...]) -> bytes:
    table = {
        "versions": {"qdeploy": __version__, **installed_versions()},
        **request.facts,
        "seconds": made.seconds,
        "clean": asdict(made.clean),
        "rates": {name: asdict(found) for name, found in made.rates.items()},
        "goals_missed": missed,
        "log": made.log,
    }
    return (json.dumps(table, indent=1) + "\n").encode()
