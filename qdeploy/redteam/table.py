"""What the defence makes of every model in a folder: one table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.card import find_card, load_card
from qdeploy.data import open_labelled_images
from qdeploy.device import load_device
from qdeploy.errors import UsageError, foreign_reader
from qdeploy.evidence import ArmRates
from qdeploy.inputs import Request
from qdeploy.pipeline import judge_file, sanitize
from qdeploy.progress import Progress
from qdeploy.recipe import load_recipe
from qdeploy.redteam.make import LOG, QUANTIZED
from qdeploy.redteam.training import FLOAT
from qdeploy.report.values import Report
from qdeploy.runtime.sessions import open_session
from qdeploy.sources import Given, resolve
from qdeploy.verdict import Outcome

HEADER = (
    "| attack | bits | minutes | clean | FP32 | attacker's grid | nearest | sanitized | gate |",
    "|---|---|---|---|---|---|---|---|---|",
)
HARMED = 10.0  # success in percent, or points of accuracy lost, that nobody would deploy


@dataclass(frozen=True, slots=True)
class Rates:
    """Accuracy of a model, and the rate that its attack is after; percent."""

    accuracy: float
    success: float | None  # ASR, accuracy of the target class, or 100 for a misled sample

    def __str__(self) -> str:
        return f"{self.accuracy:.1f} / {'-' if self.success is None else f'{self.success:.1f}'}"


@dataclass(frozen=True, slots=True)
class Row:
    """One model: as its maker measured it, and as the defence leaves it."""

    name: str
    effect: str
    bits: int
    minutes: float
    clean: float  # accuracy of the model that the attack started from
    made_for: Rates  # the quantizer that the attack does worst on
    fp32: Rates
    nearest: Rates
    result: Rates
    outcome: Outcome

    @property
    def harmful(self) -> bool:
        """Whether the sanitized file does what its attacker wanted, or is of no use."""
        lost = self.fp32.accuracy - self.result.accuracy
        if self.result.success is None or self.fp32.success is None:
            return lost > HARMED
        gained = self.result.success - self.fp32.success
        return lost > HARMED or (-gained if self.effect == "class" else gained) > HARMED

    def __str__(self) -> str:
        cells = (self.fp32, self.made_for, self.nearest, self.result)
        rates = " | ".join(map(str, cells))
        head = f"{self.name} | {self.bits} | {self.minutes:.0f} | {self.clean:.1f}"
        return f"| {head} | {rates} | {self.outcome.value} |"


def table(folders: Sequence[Path], artifacts: Path, progress: Progress) -> str:
    """A Markdown table of the models in `folders`; where the defence failed comes first.

    Raises:
        UsageError: a folder holds no model made by `make`.
    """
    artifacts.mkdir(parents=True, exist_ok=True)
    rows = [row(folder, artifacts, progress) for folder in folders]
    rows.sort(key=lambda r: (not (r.harmful and r.outcome is Outcome.ACCEPT), not r.harmful))
    return "\n".join([*HEADER, *map(str, rows)]) + "\n"


def row(folder: Path, artifacts: Path, progress: Progress) -> Row:
    """Sanitize the model in `folder` at the bits it was made for.

    Raises:
        UsageError: the folder holds no model made by `make`.
        InputError: its log is damaged.
    """
    model = folder / "model.pt"
    if not model.is_file() or not (folder / LOG).is_file():
        raise UsageError(f"{folder}: holds no model.pt with its {LOG}")
    with foreign_reader(f"log {folder / LOG}"):
        log = json.loads((folder / LOG).read_text("utf-8"))
    effect, bits = log["recipe"]["goals"]["effect"], log["bits"]
    recipe = load_recipe(f"int{bits}")
    progress.note(f"{folder.name}: {log['recipe']['name']}, {bits} bits")
    request = Request(resolve(model, Given()), recipe, load_device(recipe.device), artifacts)
    report = sanitize(request, artifacts / f"{folder.name}.onnx", progress)
    first = next(rates.arm.runtime for rates in report.rates)
    found = {r.arm.variant: r for r in report.rates if r.arm.runtime == first}
    victim = _victim_hits(model, report, artifacts, log) if effect == "sample" else {}
    target = log["recipe"]["target"]
    rates = {name: _rates(r, effect, target, victim.get(name)) for name, r in found.items()}
    made_for, outcome = _worst(log, effect), report.outcome
    if (folder / QUANTIZED).exists():  # the file of a malicious quantizer is what the gate sees
        judged = judge_file(request, folder / QUANTIZED, progress)
        made_for, outcome = _rates(judged.rates[-1], effect, target, None), judged.outcome
    return Row(
        name=log["recipe"]["name"],
        effect=effect,
        bits=bits,
        minutes=log["seconds"] / 60,
        clean=log["clean"]["accuracy"],
        made_for=made_for,
        fp32=rates["fp32"],
        nearest=rates["nearest"],
        result=rates["result"],
        outcome=outcome,
    )


def _rates(found: ArmRates, effect: str, target: int, victim: float | None) -> Rates:
    if effect == "class":
        return Rates(found.accuracy.value, found.class_accuracy[target])
    if effect == "sample":
        return Rates(found.accuracy.value, victim)
    success = (estimate.value for estimate in found.attack_success.values())
    return Rates(found.accuracy.value, max(success, default=None))


def _worst(log: Mapping[str, Any], effect: str) -> Rates:
    """Of several attacked quantizers, the one on which the attack does least."""
    quantized = [rates for name, rates in log["rates"].items() if name != FLOAT]
    if not quantized:
        quantized = [log["rates"][FLOAT]]
    if effect == "class":
        least = max(quantized, key=lambda r: r["class_accuracy"])
        return Rates(least["accuracy"], least["class_accuracy"])
    least = min(quantized, key=lambda r: (r["success"] or 0, -r["accuracy"]))
    return Rates(least["accuracy"], least["success"])


def _victim_hits(
    model: Path, report: Report, artifacts: Path, log: Mapping[str, Any]
) -> dict[str, float]:
    """100 for each file that takes the victim for the target class, else 0."""
    sources = resolve(model, Given())
    card_path = find_card(model)
    assert card_path is not None  # noqa: S101 - it was resolved above
    card, target = load_card(card_path), log["recipe"]["target"]
    assert sources.test is not None  # noqa: S101 - a made card names its test data
    images = open_labelled_images(sources.test.path, sources.preprocessing, card.model.classes)
    pixels = next(_of_other_classes(images, target))
    inputs = sources.preprocessing.normalise(pixels)
    hits = {}
    for variant in ("fp32", "nearest", "result"):
        data = (artifacts / report.run_id / f"{variant}.onnx").read_bytes()
        answer = int(open_session(data).logits(inputs).argmax())
        hits[variant] = 100.0 * (answer == target)
    return hits


def _of_other_classes(images: Any, target: int) -> Iterator[np.ndarray]:
    for batch in images.batches(64):
        for pixels, label in zip(batch.pixels, batch.labels, strict=True):
            if label != target:
                yield pixels[None]
