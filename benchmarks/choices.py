"""What each choice of the rounding does: accuracy, attack success, and what it costs.

    python benchmarks/choices.py MODEL [--arch FILE.py:FACTORY] [--bits 4|8]

The model needs a card (or options) with calibration images, test images and a trigger. Every line
is the default with one thing changed, measured on the emitted file under onnxruntime.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from qdeploy.api.requests import quantize_request
from qdeploy.api.settings import SanitizeSettings
from qdeploy.exporting.exporter import export
from qdeploy.formats.opening import load
from qdeploy.inputs.opened import open_calibration, open_evidence
from qdeploy.inputs.requests import Request
from qdeploy.judging.rates import ArmRates, rates
from qdeploy.progress import SILENT
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.emit import emit
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask, round_layers
from qdeploy.runtime.answers import predict
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.methods import EfrapDescent, Nearest, Rounding, Stochastic
from qdeploy.settings.recipe import ActivationSpec
from qdeploy.values import Architecture, Arm, FloatModel, QuantPlan

MINMAX = ActivationSpec()
CHOICES: dict[str, tuple[Rounding, ActivationSpec]] = {
    "nearest": (Nearest(), MINMAX),
    "stochastic": (Stochastic(), MINMAX),
    "default": (EfrapDescent(), MINMAX),
    **{f"flip weight {mu:g}": (EfrapDescent(flip_weight=mu), MINMAX) for mu in (0, 0.1, 0.5, 1, 2)},
    "start nearest": (EfrapDescent(start="nearest"), MINMAX),
    "start flipped": (EfrapDescent(start="flipped"), MINMAX),
    **{f"{n} sweeps": (EfrapDescent(sweeps=n), MINMAX) for n in (1, 4, 20)},
    "no bias correction": (EfrapDescent(bias_correction=False), MINMAX),
    **{f"{n} positions": (EfrapDescent(positions=n), MINMAX) for n in (8, 256)},
    **{f"damping {d:g}": (EfrapDescent(damping=d), MINMAX) for d in (1e-6, 1e-2)},
    "inputs quantized": (EfrapDescent(inputs="quantized"), MINMAX),
    "inputs quantized, flip weight 1": (EfrapDescent(inputs="quantized", flip_weight=1), MINMAX),
    "percentile ranges": (EfrapDescent(), ActivationSpec(observer="percentile")),
    "mse ranges": (EfrapDescent(), ActivationSpec(observer="mse")),
    "activations in float": (EfrapDescent(), ActivationSpec(bits="none")),
}


class Bench:
    """One model with its images, opened once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        sources = request.sources
        architecture = Architecture(*sources.architecture) if sources.architecture else None
        loaded = load(sources.model, architecture)
        self.model: FloatModel = export(loaded, stated=sources.stated)
        plan = plan_layers(self.model, request.recipe, request.device)
        self.calibration = open_calibration(request, loaded, plan, SILENT)
        self.evidence = open_evidence(
            request, self.model.classes, [self.calibration.fitted], SILENT
        )

    def plan(self, rounding: Rounding, activations: ActivationSpec) -> QuantPlan:
        changes = {"rounding": rounding, "activations": activations}
        recipe = self.request.recipe.model_copy(update=changes)
        return plan_layers(self.model, recipe, self.request.device)

    def measure(self, data: bytes, variant: str) -> ArmRates:
        arms = {Arm("fp32", "cpu"): open_session(self.model.onnx, spinning=False)}
        if variant != "fp32":
            arms[Arm("result", "cpu")] = open_session(data, spinning=False)
        assert self.evidence.images is not None
        answers = predict(arms, self.evidence.images, self.evidence.triggers)
        return rates(answers, self.model.classes)[-1]

    def line(self, rounding: Rounding, activations: ActivationSpec) -> str:
        plan = self.plan(rounding, activations)
        images = self.calibration.images
        grids = calibrate(self.model, plan, images, activations)
        started = time.perf_counter()
        layers = round_layers(RoundingTask(self.model, plan, grids, images, 0), rounding)
        seconds = time.perf_counter() - started
        measured = self.measure(emit(self.model, plan, grids, layers).onnx, "result")
        flipped = np.mean([layer.flipped for layer in layers])
        error = np.mean([layer.output_error for layer in layers])
        return f"{figures(measured)}{100 * flipped:>9.1f}{100 * error:>10.3f}{seconds:>8.1f}"


def figures(measured: ArmRates) -> str:
    success = max((e.value for e in measured.attack_success.values()), default=float("nan"))
    assert measured.against_float is not None
    agreement = measured.against_float.agreement.value
    return f"{measured.accuracy.value:>8.2f}{success:>8.2f}{agreement:>8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--arch")
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4)
    given = parser.parse_args()
    settings: SanitizeSettings = {"bits": given.bits, "data_roots": ["/"]}  # the card is one's own
    if given.arch is not None:
        settings["arch"] = given.arch
    bench = Bench(quantize_request(given.model, settings))
    print(f"{'':<33}{'CDA %':>8}{'ASR %':>8}{'agree %':>8}{'flip %':>9}{'error %':>10}{'s':>8}")
    print(f"{'float32':<33}{figures(bench.measure(b'', 'fp32'))}")
    for name, (rounding, activations) in CHOICES.items():
        print(f"{name:<33}{bench.line(rounding, activations)}", flush=True)


if __name__ == "__main__":
    main()
