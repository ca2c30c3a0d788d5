"""The commands that a fleet is made of, a row each: what decides about one, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.api.requests import gate_request, quantize_request
from qdeploy.compare.matrix import parse_matrix
from qdeploy.errors import InputError, UsageError
from qdeploy.fleet.facts import Digests
from qdeploy.fleet.options import Verb, arguments
from qdeploy.fleet.seen import REPORT, TRAINING, Seen, compared, judged, made, scanned
from qdeploy.inputs.requests import QuantizeRequest, Request

MODEL, PAGE, SARIF = "model.onnx", "report.html", "report.sarif"
COMPARISON = "comparison"
TABLE = f"{COMPARISON}/table.md"


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be done with one model."""

    verb: Verb
    model: Path
    label: str  # how the model is called
    options: Mapping[str, Any]
    recipe: str | None = None
    policy: str | None = None
    device: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Keywords of the verb."""
        axes = {"recipe": self.recipe, "policy": self.policy, "device": self.device}
        return {**self.options, **{key: value for key, value in axes.items() if value is not None}}

    @property
    def title(self) -> str:
        """What is done, in words."""
        axes = (self.recipe, self.policy, self.device)
        return ", ".join([self.label, self.verb, *(Path(axis).stem for axis in axes if axis)])


@dataclass(frozen=True, slots=True)
class Row:
    """One command.

    Attributes:
        axes: Of a job, those that multiply it.
        facts: What decides about what comes of it.
        command: Its words, given a folder for what it leaves and one for what it may go on from.
        left: The file that shows that it came to its end.
        seen: What came of it, from its exit code and the folder.
        goes_on: From what an earlier attempt has left there.
    """

    axes: tuple[str, ...]
    facts: Callable[[Asked, Digests], dict[str, Any]]
    command: Callable[[Asked, Path, Path], list[str]]
    left: str
    seen: Callable[[int, Path], Seen]
    goes_on: bool = False


def verb_of(name: Verb) -> Row:
    """The row of a verb."""
    return ROWS[name]


def members(suite: str, options: Mapping[str, Any], where: str) -> Iterator[Asked]:
    """The models that a suite of the red team makes.

    Raises:
        UsageError: there is no such suite.
        InputError: the suite is not valid, or it is not said what to train on.
    """
    if "data" not in options:
        raise InputError(f"{where}: options.data: is missing", hint="digits, or a folder or zip")
    from qdeploy.redteam.suite import load_suite, named_members

    for name, member in named_members(load_suite(suite)):
        yield Asked("redteam", Path(), name, {**member, **options})


def _sanitize_facts(asked: Asked, digests: Digests) -> dict[str, Any]:
    settings: Any = asked.settings
    request = quantize_request(asked.model, settings, out=Path(MODEL))
    first = request.cleaning
    return {
        **_quantize_facts(request, digests),
        "cleaning": first and [first.spec.model_dump(mode="json"), first.image_count],
        "images": digests.of_options(asked.options, "images"),
    }


def _quantize_facts(request: QuantizeRequest, digests: Digests) -> dict[str, Any]:
    return {
        **_request_facts(request, digests),
        "recipe": request.recipe.model_dump(mode="json"),
        "synthetic": request.synthetic_calibration,
    }


def _request_facts(request: Request, digests: Digests) -> dict[str, Any]:
    return {
        **digests.of_sources(request.sources),
        "policy": request.policy.model_dump(mode="json"),
        "device": request.device.model_dump(mode="json"),
        "code": request.run_code_from_model,
    }


def _gate_facts(asked: Asked, digests: Digests) -> dict[str, Any]:
    settings: Any = asked.settings
    return {
        **_request_facts(gate_request(asked.model, settings), digests),
        "file": digests.of_model(asked.model),
        "made_by": digests.of_options(asked.options, "made_by"),
    }


def _scan_facts(asked: Asked, digests: Digests) -> dict[str, Any]:
    reference = asked.options.get("reference")
    settings: Any = {key: value for key, value in asked.options.items() if key != "reference"}
    return {
        **digests.of_sources(quantize_request(asked.model, settings).sources),
        "reference": None if reference is None else digests.of_model(Path(reference)),
        "code": asked.options.get("run_code_from_model", False),
    }


def _compare_facts(asked: Asked, digests: Digests) -> dict[str, Any]:
    matrix = ("methods", "grids", "widths", "activation_widths", "seeds", "steps")
    _check_matrix(asked.options)
    known: Any = {key: value for key, value in asked.settings.items() if key not in matrix}
    return {
        **_quantize_facts(quantize_request(asked.model, known), digests),
        "matrix": {key: asked.options.get(key) for key in matrix},
    }


def _check_matrix(options: Mapping[str, Any]) -> None:
    """Find out before the work that no such comparison can be made.

    Raises:
        UsageError: a method or a grid is unknown, or a number is less than one.
    """
    said = {"methods": "nearest", "grids": "absmax", "widths": "4", "activation_widths": "8"}
    words = [str(options.get(key, usual)) for key, usual in said.items()]
    for key in ("seeds", "steps"):
        if options.get(key, 1) < 1:
            raise UsageError(f"{key} {options[key]}: must be at least 1")
    parse_matrix(words[0], words[1], words[2], words[3], 1)


def _redteam_facts(asked: Asked, digests: Digests) -> dict[str, Any]:
    from qdeploy.redteam.recipe import load_attack

    data = Path(asked.options["data"])
    return {
        "member": {key: asked.options.get(key) for key in ("arch", "arch_args", "bits", "seed")},
        "attack": load_attack(asked.options["attack"]).model_dump(mode="json"),
        "data": digests.of(data) if data.exists() else str(data),
        "given": digests.of_options(asked.options, "test", "base"),
    }


def _sanitize(asked: Asked, folder: Path, kept: Path) -> list[str]:
    return _judged("sanitize", asked, folder, kept, "--out", str(folder / MODEL))


def _gate(asked: Asked, folder: Path, kept: Path) -> list[str]:
    return _judged("gate", asked, folder, kept)


def _judged(verb: str, asked: Asked, folder: Path, kept: Path, *more: str) -> list[str]:
    reports = [word for name in (REPORT, PAGE) for word in ("--report", str(folder / name))]
    said = [*arguments(asked.settings), *more, *reports, "--artifacts", str(kept)]
    return [verb, str(asked.model), *said]


def _scan(asked: Asked, folder: Path, kept: Path) -> list[str]:  # noqa: ARG001 - it keeps nothing
    reports = [word for name in (REPORT, SARIF) for word in ("--report", str(folder / name))]
    return ["scan", str(asked.model), *arguments(asked.settings), *reports]


def _compare(asked: Asked, folder: Path, kept: Path) -> list[str]:  # noqa: ARG001 - the same
    out = ["--out", str(folder / COMPARISON)]
    return ["compare", str(asked.model), *arguments(asked.settings), *out]


def _redteam(asked: Asked, folder: Path, kept: Path) -> list[str]:
    said = [*arguments(asked.options), "--out", str(folder)]
    shared = kept.parent.parent / "clean-models"  # which several attacks start from
    return ["redteam", "make", *said, "--artifacts", str(shared)]


ROWS: Mapping[Verb, Row] = {
    "sanitize": Row(("recipes", "policies", "devices"), _sanitize_facts, _sanitize, REPORT, judged),
    "gate": Row(("policies", "devices"), _gate_facts, _gate, REPORT, judged),
    "scan": Row((), _scan_facts, _scan, REPORT, scanned),
    "compare": Row(("devices",), _compare_facts, _compare, TABLE, compared),
    "redteam": Row((), _redteam_facts, _redteam, TRAINING, made, goes_on=True),
}
