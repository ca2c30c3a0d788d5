"""What the defence makes of every model in a folder: one table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy import __version__
from qdeploy.disk.files import make_folder, write_atomically
from qdeploy.errors import UsageError, foreign_reader
from qdeploy.inputs.requests import QuantizeRequest
from qdeploy.inputs.sources import Given, resolve
from qdeploy.judging.rates import ArmRates
from qdeploy.judging.verdict import Outcome, judge
from qdeploy.progress import Progress
from qdeploy.redteam.make import LOG, MODEL, QUANTIZED, VICTIM
from qdeploy.redteam.training import FLOAT
from qdeploy.runs.gate import Subject, gate
from qdeploy.runs.sanitize import sanitize
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.checks import that_need
from qdeploy.settings.device import load_device
from qdeploy.settings.recipe import load_recipe

HEADER = (
    "| attack | bits | minutes | clean | FP32 | attacker's grid | nearest | sanitized "
    "| gate | blind gate |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
ROWS = "redteam-rows"  # of a table that is not finished, in the artifacts
ASR_CHECKS = that_need("trigger")
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
    blind: Outcome  # had the trigger not been known

    @property
    def harmful(self) -> bool:
        """Whether the sanitized file does what its attacker wanted, or is of no use."""
        lost = self.fp32.accuracy - self.result.accuracy
        reached = self.result.success or 0.0
        if self.effect == "class":
            reached = (self.fp32.success or 0.0) - reached
        return max(lost, reached) > HARMED

    def __str__(self) -> str:
        cells = (self.fp32, self.made_for, self.nearest, self.result)
        rates = " | ".join(map(str, cells))
        gate = f"{self.outcome.value} | {self.blind.value}"
        head = f"{self.name} | {self.bits} | {self.minutes:.0f} | {self.clean:.1f}"
        return f"| {head} | {rates} | {gate} |"

    @property
    def rank(self) -> int:
        """Its place in the table: first what nobody would have noticed."""
        return 2 - self.harmful - (self.harmful and self.blind is Outcome.ACCEPT)


def table(
    folders: Sequence[Path], artifacts: Path, progress: Progress, *, images: int | None = None
) -> str:
    """A Markdown table of the models in `folders`; where the defence failed comes first.

    Rows are kept until the last one is there, so that an interrupted table goes on.

    Args:
        images: How many test images to measure on, at most; None for all.

    Raises:
        UsageError: a folder holds no model made by `make`.
        InputError: its log is damaged.
        OutputError: the artifacts cannot be written.
    """
    make_folder(artifacts / ROWS)
    made = [read_made(folder) for folder in folders]
    asked = (Asked(m, bits, images) for m in made for bits in m.widths)
    rows = [_kept_row(one, artifacts, progress) for one in asked]
    rows.sort(key=lambda row: row.rank)
    for kept in rows:
        kept.path.unlink(missing_ok=True)
    return "\n".join([*HEADER, *(row.text for row in rows)]) + "\n"


@dataclass(frozen=True, slots=True)
class MadeModel:
    """A model of `make`, with its log."""

    path: Path
    log: Mapping[str, Any]

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits to sanitize it at: a backdoor that is live in float32 was made for none."""
        live = self.log["recipe"]["goals"]["min_float_success"] is not None
        return (8, 4) if live else (self.log["bits"],)


def read_made(folder: Path) -> MadeModel:
    """The model that `make` left in `folder`.

    Raises:
        UsageError: there is none, or it is a dud.
        InputError: its log is damaged.
    """
    path = folder / f"{MODEL}.pt"
    if not path.is_file() or not (folder / LOG).is_file():
        raise UsageError(f"{folder}: holds no {path.name} with its {LOG}")
    with foreign_reader(f"log {folder / LOG}"):
        made = MadeModel(path, json.loads((folder / LOG).read_text("utf-8")))
        made.widths  # noqa: B018 - a log without it is damaged
    return made


@dataclass(frozen=True, slots=True)
class Asked:
    """What a row is about."""

    made: MadeModel
    bits: int
    images: int | None


@dataclass(frozen=True, slots=True)
class KeptRow:
    """A row as it is kept."""

    path: Path
    rank: int
    text: str


def _kept_row(asked: Asked, artifacts: Path, progress: Progress) -> KeptRow:
    """A row, made or left by an interrupted run."""
    facts = hashlib.sha256(asked.made.path.read_bytes())
    about = [asked.made.log, asked.bits, asked.images, __version__]
    facts.update(json.dumps(about, sort_keys=True).encode())
    path = artifacts / ROWS / f"{facts.hexdigest()[:12]}.json"
    if path.exists():
        rank, text = json.loads(path.read_text("utf-8"))
    else:
        made_row = row(asked, artifacts, progress)
        rank, text = made_row.rank, str(made_row)
        write_atomically(path, json.dumps([rank, text]).encode())
    return KeptRow(path, rank, text)


def row(asked: Asked, artifacts: Path, progress: Progress) -> Row:
    """Sanitize a model and set what becomes of it beside what its maker measured."""
    model, log, bits = asked.made.path, asked.made.log, asked.bits
    folder = model.parent
    effect, target = log["recipe"]["goals"]["effect"], log["recipe"]["target"]
    recipe = load_recipe(f"int{bits}")
    measured = recipe.validation.model_copy(update={"latency_runs": 0, "images": asked.images})
    recipe = recipe.model_copy(update={"validation": measured})
    progress.note(f"{folder.name}: {log['recipe']['name']}, {bits} bits")
    request = QuantizeRequest(
        sources=resolve(model, Given(data_roots=(Path("/"),))),  # made here: its card is ours
        recipe=recipe,
        policy=recipe.policy(),
        device=load_device(recipe.device),
        artifacts=artifacts,
    )
    report = sanitize(request, artifacts / f"{folder.name}-int{bits}.onnx", progress)
    first = next(rates.arm.runtime for rates in report.rates)
    found = {r.arm.variant: r for r in report.rates if r.arm.runtime == first}
    victim = _victim_hits(folder, artifacts / report.run_id, target) if effect == "sample" else {}
    rates = {name: _rates(r, effect, target, victim.get(name)) for name, r in found.items()}
    made_for, judged = _worst(log, effect), report
    if (folder / QUANTIZED).exists():  # the file of a malicious quantizer is what the gate sees
        judged = gate(request, Subject(folder / QUANTIZED, has_reference=True), progress)
        made_for = _rates(judged.rates[-1], effect, target, None)
    blind = [check for check in judged.checks if check.name not in ASR_CHECKS]
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
        outcome=judged.outcome,
        blind=judge(blind, judged.required - ASR_CHECKS),
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


def _victim_hits(folder: Path, run: Path, target: int) -> dict[str, float]:
    """100 for each file that takes the victim for the target class, else 0."""
    with foreign_reader(f"victim {folder / VICTIM}"):
        inputs = np.load(folder / VICTIM, allow_pickle=False)
    hits = {}
    for variant in ("fp32", "nearest", "result"):
        answer = open_session((run / f"{variant}.onnx").read_bytes()).logits(inputs).argmax()
        hits[variant] = 100.0 * (int(answer) == target)
    return hits
