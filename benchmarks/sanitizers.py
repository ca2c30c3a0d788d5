"""What sanitizers leave of accuracy and backdoor, by method, number of images and seed.

    python benchmarks/sanitizers.py NAME=MODEL... --images UNLABELLED --out FOLDER \
        [--methods unlearn,kd,bcu,asd,asd-paper] [--counts 5000,20000] [--seeds 3]

Models need cards with test images and, for an ASR, a trigger. Students are made by `qdeploy
clean` and kept in FOLDER/NAME/METHOD-COUNT-SEED; what is there is not made again, and an
interrupted one goes on. Rates are of the file re-read from disk and exported, under onnxruntime.
Prints a table: mean and standard deviation over seeds, minutes of a student.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from qdeploy.api.requests import quantize_request
from qdeploy.api.settings import SanitizeSettings
from qdeploy.exporting.exporter import export
from qdeploy.inputs.opened import open_evidence
from qdeploy.judging.rates import rates
from qdeploy.progress import SILENT
from qdeploy.runs.opening import open_source
from qdeploy.runtime.answers import predict
from qdeploy.runtime.sessions import open_session
from qdeploy.values import Arm

HEADER = """\
| model | sanitizer | images | seeds | accuracy | ASR | minutes |
|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Measured:
    """Rates of one file in percent; minutes that it took to make."""

    accuracy: float
    success: float | None
    minutes: float


def measure(
    model: Path, test_images: int | None, minutes: float, card: Path | None = None
) -> Measured:
    settings: SanitizeSettings = {"data_roots": ["/"]}  # a card of one's own may name any data
    if card is not None:
        settings["card"] = card
    if test_images is not None:
        settings["test_images"] = test_images
    request = quantize_request(model, settings)
    loaded = open_source(request.sources, run_code_from_model=False)
    exported = export(loaded, stated=request.sources.stated)
    evidence = open_evidence(request, exported.classes, (), SILENT)
    if evidence.images is None:
        raise SystemExit(f"{model}: its card names no test images")
    arms = {Arm("fp32", "cpu"): open_session(exported.onnx, spinning=False)}
    found = rates(predict(arms, evidence.images, evidence.triggers), exported.classes)[-1]
    success = max((e.value for e in found.attack_success.values()), default=None)
    return Measured(found.accuracy.value, success, minutes)


def student(
    name: str, model: Path, method: str, count: int, seed: int, given: argparse.Namespace
) -> Path:
    out = given.out / name / f"{method}-{count}-{seed}" / "student.pt"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        kind, _, schedule = method.partition("-")
        command = [sys.executable, "-m", "qdeploy", "clean", str(model), "--out", str(out)]
        command += ["--images", str(given.images), "--image-count", str(count), "--seed", str(seed)]
        command += ["--sanitizer", kind, "--schedule", schedule or "short"]
        subprocess.run(
            [*command, "--artifacts", str(given.out / "runs")], check=True, stdout=sys.stderr
        )
    return out


def line(name: str, method: str, images: str, seeds: list[Measured]) -> str:
    cells = [name, method, images, str(len(seeds))]
    successes = [m.success for m in seeds if m.success is not None]
    for values in ([m.accuracy for m in seeds], successes, [m.minutes for m in seeds]):
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.1f}{spread}" if values else "-")
    return f"| {' | '.join(cells)} |"


def rows(given: argparse.Namespace) -> Iterator[str]:
    for text in given.models:
        name, _, path = text.partition("=")
        model = Path(path)
        yield line(name, "(teacher)", "", [measure(model, given.test_images, 0.0)])
        for method in given.methods.split(","):
            for count in map(int, given.counts.split(",")):
                made = []
                for seed in range(given.seeds):
                    out = student(name, model, method, count, seed, given)
                    minutes = json.loads(out.with_suffix(".json").read_text())["seconds"] / 60
                    made.append(measure(out, given.test_images, minutes))
                yield line(name, method, f"{count:,}", made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default="unlearn,kd,bcu,asd")
    parser.add_argument("--counts", default="5000")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--test-images", type=int)
    given = parser.parse_args()
    print(HEADER)
    for row in rows(given):
        print(row, flush=True)


if __name__ == "__main__":
    main()
