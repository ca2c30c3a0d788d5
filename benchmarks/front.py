"""What is left of accuracy and backdoor, by how far a student goes from its teacher.

    python benchmarks/front.py NAME=TEACHER=STUDENT... --out front.svg \
        [--factors 0,0.5,1,...] [--test-images N]

Several students of one NAME are several seeds. Each point is a network whose weights lie on the
line through teacher (0) and student, written to disk and measured like any model, as in
`sanitizers.py`; 1 is where the training ended, whatever factor the student was written with. Prints
a table, mean and standard deviation over the students, and draws it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure
from sanitizers import measure
from torch import Tensor

from qdeploy.api.requests import quantize_request
from qdeploy.runs.opening import open_source

FACTORS = "0,0.5,0.75,1,1.25,1.5,1.75,2"
HEADER = "| model | students | factor | accuracy | ASR |\n|---|---|---|---|---|"


def weights(model: Path) -> dict[str, Tensor]:
    request = quantize_request(model, {"data_roots": ["/"]})
    return open_source(request.sources, run_code_from_model=False).content.state_dict()


def between(teacher: Path, student: Path, factor: float, out: Path) -> None:
    """Write the network at `factor` of the way that the training went."""
    start, end = weights(teacher), weights(student)
    written = json.loads(student.with_suffix(".json").read_text())["sanitizer"]["further"]
    made = {
        name: value + (factor / written) * (end[name] - value)
        if value.is_floating_point()
        else value
        for name, value in start.items()
    }
    torch.save(made, out)


def points(
    teacher: Path, student: Path, factors: list[float], test_images: int | None
) -> list[tuple[float, float]]:
    """Accuracy and attack success for each factor, in percent."""
    found = []
    with tempfile.NamedTemporaryFile(suffix=".pt", dir=student.parent) as file:
        for factor in factors:
            between(teacher, student, factor, Path(file.name))
            rates = measure(Path(file.name), test_images, 0.0, card=student.with_suffix(".toml"))
            found.append((rates.accuracy, rates.success or 0.0))
    return found


def told(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=TEACHER=STUDENT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--factors", default=FACTORS)
    parser.add_argument("--test-images", type=int)
    given = parser.parse_args()
    factors = [float(text) for text in given.factors.split(",")]
    found: dict[str, list[list[tuple[float, float]]]] = defaultdict(list)
    for text in given.models:
        name, teacher, student = text.split("=")
        found[name].append(points(Path(teacher), Path(student), factors, given.test_images))
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    print(HEADER)
    for name, lines in found.items():
        means = []
        for factor, column in zip(factors, zip(*lines, strict=True), strict=True):
            accuracy, success = ([point[i] for point in column] for i in (0, 1))
            print(f"| {name} | {len(lines)} | {factor:g} | {told(accuracy)} | {told(success)} |")
            means.append((mean(success), mean(accuracy)))
        (drawn,) = axes.plot(*zip(*means, strict=True), marker="o", label=name)
        for line in lines:
            axes.plot(
                [s for _, s in line], [a for a, _ in line], ".", color=drawn.get_color(), alpha=0.4
            )
        for factor, place in zip(factors, means, strict=True):
            axes.annotate(
                f"{factor:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=7
            )
    axes.set(
        xlabel="attack success rate, %",
        ylabel="accuracy, %",
        title="how far to go from the teacher",
    )
    axes.legend(frameon=False)
    figure.savefig(given.out)


if __name__ == "__main__":
    main()
