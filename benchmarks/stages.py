"""Where the seconds of `sanitize` and `gate` go, beside what this machine needs at least.

    python benchmarks/stages.py
    python benchmarks/stages.py MODEL --pictures FOLDER_OR_ARCHIVE [--arch ... as both commands]

Both commands run once a round, in turn with the least that their work takes: pictures at the speed
of the decoder, moments at that of a float pass and of one large product, and answers at
onnxruntime's own: the float file and the result over the test pictures once, and once more with
each trigger. CPU seconds of all threads, medians of the rounds; nothing is kept from one round to
the next but what a user's second gate finds kept too (`--kept`). Without a model: ResNet-18 of
width 16 with random weights, and noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from command import qdeploy
from cost import make_model
from scaling import products, speed

from qdeploy.data import Images, Preprocessing, images_from_array, open_images
from qdeploy.exporting.exporter import export
from qdeploy.formats.opening import load
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.device import load_device
from qdeploy.settings.recipe import load_recipe
from qdeploy.values import Stated

CALIBRATION = 1024
POLICY = """
schema_version = 1
name = "measured"
description = "The default, without detection."
[validation]
detection = "off"
[gate]
required = ["agreement", "runtime_agreement", "batch_invariance", "static_findings"]
max_accuracy_drop = 1.0
min_agreement = 90.0
"""


@dataclass(frozen=True)
class Case:
    """What is run, where."""

    folder: Path
    model: Path
    options: Sequence[str]
    pictures: Path | None
    kept: bool

    def run(self, number: int, *command: str) -> dict[str, float]:
        """CPU seconds by stage of one command, and `whole`; outside of stages it imports."""
        report = self.folder / f"{command[0]}.json"
        state = self.folder / ("state" if self.kept else f"state-{command[0]}-{number}")
        words = [
            *command, "--quiet", "--report", str(report),
            "--policy", str(self.folder / "policy.toml"),
            "--artifacts", str(self.folder / f"runs-{command[0]}-{number}"), *self.options,
        ]  # fmt: skip
        took = qdeploy(words, variables={"QDEPLOY_STATE": str(state)})
        found = json.loads(report.read_text())
        stages = {stage["name"]: stage["cpu_seconds"] for stage in found["stages"]}
        return stages | {"whole": took.cpu_seconds}


def limits(case: Case) -> dict[str, float]:
    """CPU seconds that the work of each stage takes by itself, in this process."""
    least: dict[str, float] = {}
    float_file = case.folder / "float.onnx"
    model = export(load(float_file), stated=Stated())
    shape = model.input_shape
    preprocessing = Preprocessing(shape, (0.5,) * shape[0], (0.25,) * shape[0], resize=shape[1])
    result = json.loads((case.folder / "sanitize.json").read_text())
    tested = next(d["images"] for d in result["data"] if d["role"] == "test")
    triggers = sum(d["role"] == "trigger" for d in result["data"])
    started = time.process_time()
    images = _pictures(case, preprocessing, tested)
    least["data"] = time.process_time() - started
    float_seconds, result_seconds = (
        _answering(path, images) for path in (float_file, Path(result["output"]))
    )
    least["validate"] = (1 + triggers) * (float_seconds + result_seconds)
    recipe = load_recipe("int4")  # of its layers: the moments are the same at 8 bits
    plan = plan_layers(model, recipe, load_device(recipe.device))
    few = images.sample(16, 0)
    task = RoundingTask(
        model, plan, calibrate(model, plan, few, recipe.activations), images.sample(CALIBRATION, 0),
        0,
    )  # fmt: skip
    count = len(task.calibration())
    least["round"] = products(task) / speed() + float_seconds * count / len(images)
    least["calibrate"] = float_seconds * min(count, 256) / len(images)
    return least


def _pictures(case: Case, preprocessing: Preprocessing, count: int) -> Images:
    """Decoded once."""
    if case.pictures is None:
        size = (count, *preprocessing.shape)
        noise = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        return images_from_array("noise", noise, preprocessing)
    found, _ = open_images(case.pictures, preprocessing, part="test").sample(count, 0).decoded()
    return found


def _answering(path: Path, images: Images) -> float:
    session = open_session(path.read_bytes())
    started = time.process_time()
    for batch in images.batches(images.preprocessing.at_once):
        session.logits(images.preprocessing.normalise(batch.pixels))
    return time.process_time() - started


def show(title: str, rounds: Sequence[Mapping[str, float]], least: Mapping[str, float]) -> None:
    print(f"\n{title:<14}{'CPU s':>8}{'least':>8}{'ratio':>7}")
    bounds = {stage: least[stage] for stage in rounds[0] if stage in least}
    bounds["whole"] = sum(bounds.values())
    for stage in rounds[0]:
        took = median(found[stage] for found in rounds)
        bound = bounds.get(stage)
        beside = f"{bound:>8.1f}{took / bound:>7.1f}" if bound else ""
        print(f"  {stage:<12}{took:>8.1f}{beside}")
    answers = least["validate"]
    ratios = sorted(found["whole"] / answers for found in rounds)
    print(
        f"  whole over float and result once: {median(ratios):.2f}"
        f" ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--pictures", type=Path, help="test pictures, to be decoded")
    parser.add_argument("--bits", choices=("4", "8"), default="4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kept", action="store_true", help="as a user's second gate")
    given, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = (given.model or make_model(folder)).resolve()
        (folder / "policy.toml").write_text(POLICY)
        case = Case(folder, model, options, given.pictures, given.kept)
        qdeploy(["export", str(model), "--out", str(folder / "float.onnx"), *options])
        sanitized, gated, least = [], [], []
        for number in range(given.rounds):
            out = str(folder / f"out-{number}.onnx")
            sanitized.append(
                case.run(number, "sanitize", str(model), "--bits", given.bits, "--out", out)
            )
            written = json.loads((folder / "sanitize.json").read_text())["output"]
            gated.append(case.run(number, "gate", written, "--reference", str(model)))
            least.append(limits(case))
            print(f"round {number + 1} of {given.rounds}", file=sys.stderr)
        bounds = {stage: median(found[stage] for found in least) for stage in least[0]}
        show("sanitize", sanitized, bounds)
        show("gate", gated, bounds)


if __name__ == "__main__":
    main()
