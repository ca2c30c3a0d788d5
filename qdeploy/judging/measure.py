"""Measure the files themselves, as they lie on disk, on every runtime of the device."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float32

from qdeploy.core.metrics import rate
from qdeploy.data import Images
from qdeploy.data.triggers import Trigger
from qdeploy.disk.state import private_number
from qdeploy.errors import InputError, NoAnswerError, ProviderError, first_line
from qdeploy.formats.onnx.saturation import Saturable, saturable
from qdeploy.graph.ends import as_classifier_bytes
from qdeploy.judging.rates import (
    ArmRates,
    BatchInvariance,
    RuntimeAgreement,
    Sample,
    rates,
    samples,
    with_answers,
)
from qdeploy.machine import exact_8bit_products, processor_flags
from qdeploy.progress import SILENT, Progress
from qdeploy.runtime.answers import FORGETFUL, PredictionStore, Sampling, predict
from qdeploy.runtime.batching import FEWEST_PROBES, probes_of, same_in_any_batch
from qdeploy.runtime.boundary import FEWER_PAIRS, PAIRS, boundary, one_of_two
from qdeploy.runtime.known import Runner, runtime_of
from qdeploy.runtime.measure import may_saturate, measure_latency, milliseconds
from qdeploy.runtime.ort_format import on_phones
from qdeploy.runtime.remembered import KnownAnswers
from qdeploy.settings.device import (
    EMULATED,
    ORT_FORMAT,
    DeviceProfile,
    RuntimeSpec,
)
from qdeploy.values import (
    NOTHING_STATED,
    Arm,
    FileMade,
    Interface,
    Latency,
    Predictions,
    Stated,
    Variant,
)

EMULATED_IMAGES, FEWER, LARGE = 500, 200, 1 << 16  # fewer of so many values: seconds an image
FEW_RUNS = 10  # of a runtime that nothing is held against
SHOWN = 1200  # images that a file is asked about which is there to compare with, at least


Decided = Callable[[ArmRates, RuntimeAgreement], bool]  # whatever else were asked of it


@dataclass(frozen=True, slots=True)
class Trial:
    """What is measured: the bytes of each variant, read back from disk, and what to ask them."""

    interface: Interface  # of every file
    files: Mapping[Variant, bytes]  # has result; fp32 where there is a float model
    images: Images | None  # labelled; None: nothing but latency can be measured
    triggers: Sequence[Trigger]
    latency_runs: int
    seen: Mapping[str, Bool[np.ndarray, " images"]] = field(default_factory=dict)  # by trigger
    stated: Stated = NOTHING_STATED  # of the result's ends
    decided: Decided | None = None  # None: everything is asked of every arm
    of_float: KnownAnswers | None = None  # what the float model is known to say

    def classifiers(self) -> Mapping[Variant, bytes]:
        """The files as they are run: the result, which may be a stranger's, between its ends."""
        result = as_classifier_bytes(self.files["result"], self.stated, where="the result file")
        return {**self.files, "result": result}


@dataclass(frozen=True, slots=True)
class Measured:
    files: tuple[FileMade, ...]
    rates: tuple[ArmRates, ...] = ()
    batches: tuple[BatchInvariance, ...] = ()
    runtimes: tuple[RuntimeAgreement, ...] = ()
    latencies: tuple[Latency, ...] = ()
    samples: tuple[Sample, ...] = ()
    saturable: Saturable | None = None  # None: the file is not one in integers that can be told
    phones: tuple[str, ...] = ()  # what is known of providers that are not here


def validate(
    trial: Trial,
    device: DeviceProfile,
    *,
    store: PredictionStore = FORGETFUL,
    progress: Progress = SILENT,
) -> Measured:
    """Rates of every variant; of the result on every runtime that the device profile names.

    Raises:
        ProviderError: a runtime of the profile is not there, or cannot run the file.
        InputError: a file is no classifier, or not of what it should be.
    """
    pairs = _saturable(trial.files["result"])
    device = _as_it_computes(device, pairs, trial.interface)
    saturating = may_saturate(device, trial.files.values())
    first = device.runtimes[0]
    files = tuple(_file(variant, data, first) for variant, data in trial.files.items())
    run = trial.classifiers()
    latencies = measure_latency(
        run.items(),
        trial.interface.input_shape,
        runtime=first,
        runs=trial.latency_runs,
        saturating=saturating,
    )
    sessions, unsupported = _sessions(run, device, saturating=saturating)
    reference = Arm("fp32", first.label)
    if trial.of_float is not None and reference in sessions:
        sessions[reference] = trial.of_float.of(sessions[reference])
    _check_interface(sessions, trial.interface)
    runtimes = _others(run["result"], device, sessions, unsupported, trial)
    batches = _batch_invariance(trial, device, sessions, progress)
    phones = tuple(on_phones(run["result"])) if _for_phones(device) else ()
    without_images = Measured(
        files, (), batches, runtimes, latencies, saturable=pairs, phones=phones
    )
    if trial.images is None:
        return without_images
    predictions = predict(
        sessions,
        trial.images,
        trial.triggers,
        sampling=_sampling(trial, device, sessions),
        store=store,
        progress=progress,
    )
    return replace(
        without_images,
        rates=rates(predictions, trial.interface.classes, trial.seen),
        runtimes=_at_boundary(with_answers(runtimes, predictions), trial, device, sessions),
        samples=samples(predictions, trial.images, trial.triggers),
    )


def _sampling(trial: Trial, device: DeviceProfile, sessions: Mapping[Arm, Runner]) -> Sampling:
    """All that is judged is asked on the first runtime; of the rest, until it is decided."""
    few = {Arm("result", r.label): r.images for r in device.runtimes if r.images is not None}
    seed = private_number("images", hashlib.sha256(trial.files["result"]).hexdigest())
    decided = trial.decided
    if decided is None:
        return Sampling(seed, few)
    first = device.runtimes[0].label
    whole = {Arm("result", first), Arm("fp32", first), *few}

    def enough(arm: Arm, known: Predictions) -> bool:
        if arm.variant != "result":
            return int(known.asked(arm).sum()) >= SHOWN
        found = {one.arm: one for one in rates(known, trial.interface.classes, trial.seen)}
        (beside,) = with_answers([RuntimeAgreement(arm.runtime)], known)
        return decided(found[arm], beside)

    return Sampling(seed, few, frozenset(sessions.keys() - whole), enough)


def _for_phones(device: DeviceProfile) -> bool:
    return any(runtime.provider == ORT_FORMAT for runtime in device.runtimes)


def _as_it_computes(
    device: DeviceProfile, pairs: Saturable | None, interface: Interface
) -> DeviceProfile:
    """The device, emulated too where it saturates, this file can, and this processor would not."""
    here = exact_8bit_products(processor_flags())
    asked = any(runtime.provider == EMULATED for runtime in device.runtimes)
    if not here or not device.saturates or asked or pairs is None or not pairs.pairs:
        return device
    images = FEWER if math.prod(interface.input_shape) > LARGE else EMULATED_IMAGES
    emulated = RuntimeSpec(provider=EMULATED, images=images)
    return device.model_copy(update={"runtimes": (*device.runtimes, emulated)})


def _saturable(data: bytes) -> Saturable | None:
    try:
        return saturable(data, "the result file")
    except InputError:
        return None


def _batch_invariance(
    trial: Trial, device: DeviceProfile, sessions: Mapping[Arm, Runner], progress: Progress
) -> tuple[BatchInvariance, ...]:
    """Of the result on every runtime that is not slow; which batches there are, nobody foresees."""
    data = trial.files["result"]
    seed = private_number("batches", hashlib.sha256(data).hexdigest())
    probes = _probes(trial, seed)
    slow = {runtime.label for runtime in device.runtimes if runtime.images is not None}
    arms = [arm for arm in sessions if arm.variant == "result" and arm.runtime not in slow]
    first = device.runtimes[0].label
    return tuple(
        BatchInvariance(
            arm.runtime,
            rate(
                same_in_any_batch(
                    sessions[arm], probes if arm.runtime == first else probes[:FEWEST_PROBES], seed
                )
            ),
        )
        for arm in progress.track(arms, "batches", len(arms))
    )


def _probes(trial: Trial, seed: int) -> Float32[np.ndarray, "probes channels height width"]:
    """Test images, every second one with a trigger in it, and noise where they do not suffice."""
    rng = np.random.default_rng(seed)
    count = probes_of(trial.interface.input_shape)
    found = rng.normal(size=(count, *trial.interface.input_shape)).astype(np.float32)
    if trial.images is None or not len(trial.images):
        return found
    sample = trial.images.sample(count, seed)
    pixels = np.concatenate([batch.pixels for batch in sample.batches(count)])
    for i, trigger in enumerate(trial.triggers):
        marked = slice(2 * i + 1, None, 2 * len(trial.triggers))
        pixels[marked] = trigger.apply(pixels[marked])
    found[: len(pixels)] = sample.preprocessing.normalise(pixels)
    return found


def _sessions(
    files: Mapping[Variant, bytes], device: DeviceProfile, *, saturating: bool
) -> tuple[dict[Arm, Runner], dict[str, str]]:
    """The references on the first runtime, the result on all of them; and why not on some.

    That a runtime works at all has been seen before: what it does not run is this file.
    """
    sessions: dict[Arm, Runner] = {}
    unsupported: dict[str, str] = {}
    first, *others = device.runtimes
    for variant, data in files.items():
        sessions[Arm(variant, first.label)] = runtime_of(first).open(
            data, first, spinning=False, saturating=saturating
        )
    for runtime in others:
        try:
            found = runtime_of(runtime).open(
                files["result"], runtime, spinning=False, saturating=saturating
            )
            found.interface(where="the result file")  # it computes
        except NoAnswerError:
            raise
        except (InputError, ProviderError) as error:
            unsupported[runtime.label] = first_line(error)
        else:
            sessions[Arm("result", runtime.label)] = found
    return sessions, unsupported


def _others(
    data: bytes,
    device: DeviceProfile,
    sessions: Mapping[Arm, Runner],
    unsupported: Mapping[str, str],
    trial: Trial,
) -> tuple[RuntimeAgreement, ...]:
    """What the other runtimes make of the result, before anything is asked."""
    found = []
    for spec in device.runtimes[1:]:
        reason = unsupported.get(spec.label)
        if reason is not None:
            found.append(RuntimeAgreement(spec.label, unsupported=reason))
            continue
        runner = sessions[Arm("result", spec.label)]
        taken = milliseconds(runner, trial.interface.input_shape, min(trial.latency_runs, FEW_RUNS))
        kernels = runtime_of(spec).kernels(data, spec)
        found.append(RuntimeAgreement(spec.label, milliseconds=taken, kernels=kernels))
    return tuple(found)


def _at_boundary(
    runtimes: tuple[RuntimeAgreement, ...],
    trial: Trial,
    device: DeviceProfile,
    sessions: Mapping[Arm, Runner],
) -> tuple[RuntimeAgreement, ...]:
    """The same with what each answers where, on the first, one class ends and another begins."""
    slow = {runtime.label for runtime in device.runtimes if runtime.images is not None}
    asked = {arm.runtime: s for arm, s in sessions.items() if arm.variant == "result"}
    first = asked[device.runtimes[0].label].logits
    if trial.images is None or not set(asked) - slow - {device.runtimes[0].label}:
        return runtimes
    pairs = FEWER_PAIRS if math.prod(trial.interface.input_shape) > LARGE else PAIRS
    seed = private_number("boundary", hashlib.sha256(trial.files["result"]).hexdigest())
    sample = trial.images.sample(2 * pairs, seed)
    pixels = np.concatenate([batch.pixels for batch in sample.batches(pairs)])
    order = np.random.default_rng(seed).permutation(len(pixels))
    found = boundary(first, sample.preprocessing.normalise(pixels[order]), pairs)
    if not len(found.inputs):
        return runtimes
    return tuple(
        replace(one, boundary=rate(one_of_two(asked[one.runtime].logits, found)))
        if one.runtime in asked and one.runtime not in slow
        else one
        for one in runtimes
    )


def _check_interface(sessions: Mapping[Arm, Runner], expected: Interface) -> None:
    """Every file is a classifier of the same images into the same classes."""
    for arm, session in sessions.items():
        found = session.interface(where=f"the {arm.variant} file")
        if found != expected:
            raise InputError(
                f"the {arm.variant} file takes {found.input_shape} and knows {found.classes}"
                f" classes, the float model {expected.input_shape} and {expected.classes}"
            )


def _file(variant: Variant, data: bytes, runtime: RuntimeSpec) -> FileMade:
    kernels = runtime_of(runtime).kernels(data, runtime)
    return FileMade(variant, hashlib.sha256(data).hexdigest(), len(data), kernels)
