"""One model under comparison: opened once, quantized in many ways, each file measured."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.compare.matrix import Cell
from qdeploy.data import Images
from qdeploy.disk.files import write_atomically
from qdeploy.errors import UsageError
from qdeploy.inputs.opened import Evidence, Fitted, open_calibration, open_evidence
from qdeploy.inputs.requests import QuantizeRequest
from qdeploy.judging.rates import ArmRates, rates
from qdeploy.progress import Clock, Progress
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.emit import emit
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask, round_layers
from qdeploy.runs.opening import open_model
from qdeploy.runtime.answers import predict
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.methods import EfrapDescent
from qdeploy.settings.recipe import Recipe
from qdeploy.values import Arm, FloatModel, Grids, Loaded, Predictions, QuantPlan, RoundedLayer

LOGIT_IMAGES = 512
FLOAT = Arm("fp32", "cpu")
RESULT = Arm("result", "cpu")


@dataclass(slots=True)
class Study:
    """A model, its images, and what the cells share."""

    request: QuantizeRequest
    loaded: Loaded
    model: FloatModel
    evidence: Evidence
    answers: Predictions  # of the float model
    digests: Mapping[int, str | None]  # of the calibration images that each seed draws
    progress: Progress
    _ground: tuple[object, Grids, Images | None] | None = None  # of the last cell

    @classmethod
    def open(cls, request: QuantizeRequest, seeds: int, progress: Progress) -> Study:
        """Open the model and ask the float one about the test images.

        Raises:
            UsageError: there are no test images.
            InputError: one of them is among the calibration images that some seed draws.
        """
        loaded, model = open_model(request, Clock(progress))
        digests: dict[int, str | None] = {}
        fitted: set[bytes] = set()
        for seed in range(seeds):
            count = request.recipe.calibration.images
            images = request.sources.calibration_images(count, seed)
            digests[seed] = None
            if images is not None:
                images, hashes = images.decoded(progress)
                digests[seed] = images.digest(hashes)
                fitted.update(hashes)
        given = request.sources.calibration
        known = (
            [] if given is None else [Fitted(frozenset(fitted), f"calibration data {given.path}")]
        )
        evidence = open_evidence(request, model.classes, known, progress)
        if evidence.images is None:
            raise UsageError(
                f"model {request.sources.model}: there is nothing to compare on",
                hint="give --test, or name labelled test images in the model card",
            )
        with progress.stage("float32"):
            arms = {FLOAT: open_session(model.onnx, spinning=False)}
            answers = predict(arms, evidence.images, evidence.triggers, progress=progress)
        return cls(request, loaded, model, evidence, answers, digests, progress)

    def float_rates(self) -> ArmRates:
        """Of the model as it is."""
        return rates(self.answers, self.model.classes, self.evidence.seen)[0]

    def measure(self, cell: Cell, steps: int | None) -> dict[str, Any]:
        """Quantize as the cell says, and measure the file under onnxruntime."""
        recipe = cell.recipe(self.request.recipe, steps)
        plan = plan_layers(self.model, recipe, self.request.device)
        grids, images = self._ground_for(cell, recipe, plan)
        task = RoundingTask(self.model, plan, grids, images, cell.seed)
        wall, cpu = time.perf_counter(), time.process_time()
        layers = round_layers(task, recipe.rounding, progress=self.progress)
        cost = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        file = _through_disk(emit(self.model, plan, grids, layers).onnx)
        found = self._rates(file)
        assert found.against_float is not None  # noqa: S101 - the float model is asked first
        success = [estimate.value for estimate in found.attack_success.values()]
        return {
            "accuracy": found.accuracy.value,
            "success": max(success, default=None),
            "agreement": found.against_float.agreement.value,
            "logit_mse": self._logit_error(file),
            "bytes": len(file),
            **cost,
            **_of_layers(layers),
        }

    def _ground_for(
        self, cell: Cell, recipe: Recipe, plan: QuantPlan
    ) -> tuple[Grids, Images | None]:
        """The grids and calibration images, which all methods have in common.

        The images are there also for methods that look at none: the next one may.
        """
        key = replace(cell, method="")
        if self._ground is None or self._ground[0] != key:
            needs_images = recipe.model_copy(update={"rounding": EfrapDescent()})
            request = replace(self.request, recipe=needs_images)
            opened = open_calibration(request, self.loaded, plan, self.progress)
            grids = calibrate(self.model, plan, opened.images, recipe.activations, self.progress)
            self._ground = key, grids, opened.images
        return self._ground[1], self._ground[2]

    def _rates(self, file: bytes) -> ArmRates:
        assert self.evidence.images is not None  # noqa: S101 - `open` has looked
        arms = {RESULT: open_session(file, spinning=False)}
        found = predict(arms, self.evidence.images, self.evidence.triggers, progress=self.progress)
        both = Predictions(
            labels=found.labels,
            clean={**self.answers.clean, **found.clean},
            triggered={
                name: {**self.answers.triggered[name], **answers}
                for name, answers in found.triggered.items()
            },
            targets=found.targets,
        )
        return rates(both, self.model.classes, self.evidence.seen)[-1]

    def _logit_error(self, file: bytes) -> float:
        assert self.evidence.images is not None  # noqa: S101 - `open` has looked
        images = self.evidence.images
        batch = next(images.batches(min(LOGIT_IMAGES, len(images))))
        x = images.preprocessing.normalise(batch.pixels)
        want, got = (open_session(data).logits(x) for data in (self.model.onnx, file))
        return float(np.square(want - got).mean())


def _through_disk(data: bytes) -> bytes:
    """The file as it is read back: what is measured is what would ship."""
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
        path = Path(folder) / "model.onnx"
        write_atomically(path, data)
        return path.read_bytes()


def _of_layers(layers: tuple[RoundedLayer, ...]) -> Mapping[str, Any]:
    sizes = np.array([layer.codes.size for layer in layers])
    flipped = np.array([layer.flipped for layer in layers])
    return {
        "flipped": 100 * float((flipped * sizes).sum() / sizes.sum()),
        "layers": {layer.name: 100 * layer.flipped for layer in layers},
        "degraded": {layer.name: layer.degraded for layer in layers if layer.degraded},
    }
