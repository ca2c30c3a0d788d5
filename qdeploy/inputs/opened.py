"""The images and triggers that a run works with, opened and proved to be whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool

from qdeploy.data import Images
from qdeploy.data.triggers import Trigger
from qdeploy.errors import InputError, UsageError
from qdeploy.inputs.lacking import CALIBRATION_HINT
from qdeploy.inputs.requests import QuantizeRequest, Request
from qdeploy.inputs.synthesize import synthesize
from qdeploy.inputs.usable import described, distinct, hidden, repeated, seen
from qdeploy.progress import Progress
from qdeploy.values import DataUsed, Loaded, QuantPlan

Answers = Callable[[np.ndarray], np.ndarray]  # the logits of inputs
NO_HASHES: frozenset[bytes] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The images that scales and integers are fitted to."""

    images: Images | None  # None: weights only, by a method that looks at no images
    fitted: Fitted
    used: tuple[DataUsed, ...]
    synthetic: str | None  # how the images were made, if nobody gave any
    notes: tuple[str, ...] = ()  # what a reader must know of them


@dataclass(frozen=True, slots=True)
class Fitted:
    """Images that the model was fitted to: it must not be judged on them."""

    hashes: frozenset[bytes]
    what: str  # as an error says it; empty where nobody gave them


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """The images and triggers that the file is judged by."""

    images: Images | None
    triggers: tuple[Trigger, ...]
    used: tuple[DataUsed, ...]
    seen: Mapping[str, Bool[np.ndarray, " images"]] = field(default_factory=dict)  # by trigger
    notes: tuple[str, ...] = ()  # what of it does not count
    labelled: bool = True  # else its labels are what the float model answers


NO_EVIDENCE = Evidence(None, (), ())


def open_calibration(
    request: QuantizeRequest, loaded: Loaded, plan: QuantPlan, progress: Progress
) -> Calibration:
    """The calibration images, read once to prove that they are whole.

    Raises:
        UsageError: nobody named any, though they are needed.
        InputError: an image is damaged or of the wrong size.
    """
    images, given_by, synthetic = _calibration_images(request, loaded, plan, progress)
    if images is None:
        return Calibration(None, Fitted(NO_HASHES, ""), (), None)
    images, hashes = images.decoded(progress)
    used = DataUsed("calibration", images.name, len(images), images.digest(hashes), given_by)
    given = request.sources.calibration
    fitted = Fitted(frozenset(hashes), "" if given is None else f"calibration data {given.path}")
    return Calibration(images, fitted, (used,), synthetic, tuple(repeated(hashes)))


def open_evidence(
    request: Request,
    classes: int,
    fitted: Sequence[Fitted],
    progress: Progress,
    reference: Answers | None = None,
) -> Evidence:
    """The test images and triggers, read once to prove that they can be trusted.

    Args:
        fitted: What the model was fitted to.
        reference: Whose answers are the labels of pictures that have none, if the policy says so.

    Raises:
        InputError: an image is damaged or among those `fitted`, a label is no class, or a trigger
            does not fit into the image or changes none of them.
    """
    sources, policy = request.sources, request.policy
    triggers = sources.triggers(classes) if sources.trigger_specs else ()
    used = tuple(
        DataUsed("trigger", trigger.name, None, _digest(trigger), sources.triggers_given_by)
        for trigger in triggers
    )
    labelled = policy.validation.labels == "data"
    count, seed = policy.validation.images, policy.seed
    images = (
        sources.test_images(count, seed, classes)
        if labelled
        else sources.unlabelled_test_images(count, seed)
    )
    if images is None or sources.test is None:
        return Evidence(None, triggers, used)
    images, hashes = images.decoded(progress)
    if not labelled:
        images = _labelled_by(reference, images)
    given = [known for known in fitted if known.what and known.hashes.intersection(hashes)]
    if given:
        shared = len(frozenset().union(*(known.hashes for known in given)).intersection(hashes))
        named = " or the ".join(known.what for known in given)
        raise InputError(
            f"data: {shared} images are in both the {named} and the test data {sources.test.path}",
            hint="a model must be judged on images that it was not fitted to",
        )
    usable = distinct(images, hashes)
    images = usable.images
    digest = images.digest(usable.hashes)
    test = DataUsed("test", images.name, len(images), digest, sources.test.given_by)
    changed = seen(triggers, images)
    notes = (*usable.notes, *described(images, classes, labelled=labelled), *hidden(changed))
    return Evidence(images, triggers, (test, *used), changed, notes, labelled)


def _labelled_by(reference: Answers | None, images: Images) -> Images:
    """The images with the answers of the float model for labels.

    Raises:
        UsageError: there is no float model.
    """
    if reference is None:
        raise UsageError(
            "the policy takes the float model's answers for labels, and no float model is given",
            hint="give --reference, or a policy that takes the labels of the data",
        )
    given = images.preprocessing
    inputs = (given.normalise(batch.pixels) for batch in images.batches(given.at_once))
    answers = [reference(x).argmax(axis=1) for x in inputs]
    return replace(images, labels=np.concatenate(answers).astype(np.int64))


def _calibration_images(
    request: QuantizeRequest, loaded: Loaded, plan: QuantPlan, progress: Progress
) -> tuple[Images | None, str, str | None]:
    """The images, who gave them, and how they were made if nobody did."""
    sources, recipe = request.sources, request.recipe
    if recipe.rounding.needs == "nothing" and not plan.activations:
        return None, "", None
    preprocessing = sources.preprocessing
    images = sources.calibration_images(recipe.calibration.images, recipe.seed)
    if images is not None and sources.calibration is not None:
        return images, sources.calibration.given_by, None
    if request.synthetic_calibration:
        made = synthesize(loaded.content, preprocessing, recipe.seed, progress)
        return made.images, "synthetic", made.method
    raise UsageError(
        f"model {sources.model}: no calibration images are known",
        hint=CALIBRATION_HINT,
    )


def _digest(trigger: Trigger) -> str:
    return hashlib.sha256(trigger.mask.tobytes() + trigger.pattern.tobytes()).hexdigest()
