"""The demo: a poisoned digit classifier from data that needs no download, then its sanitization."""

from __future__ import annotations

from pathlib import Path

from qdeploy.inputs.requests import QuantizeRequest
from qdeploy.inputs.sources import Given, resolve
from qdeploy.progress import Progress
from qdeploy.redteam.datasets import DIGITS
from qdeploy.redteam.make import AttackRequest, make
from qdeploy.redteam.recipe import load_attack
from qdeploy.report.values import Report
from qdeploy.runs.sanitize import sanitize
from qdeploy.settings.device import load_device
from qdeploy.settings.policy import load_policy
from qdeploy.settings.recipe import load_recipe


def run_demo(folder: Path, *, seed: int, progress: Progress) -> Report:
    """Make the poisoned model in `folder`, sanitize it to 4 bits, and report.

    Raises:
        UsageError: scikit-learn, which brings the images, is not installed.
        DudError: with this seed the attack does not take.
    """
    made = make_poisoned_digits(folder, seed=seed, progress=progress)
    recipe = load_recipe("int4")
    policy = load_policy("demo")
    recipe = recipe.model_copy(update={"gate": policy.gate, "validation": policy.validation})
    request = QuantizeRequest(
        sources=resolve(made, Given()),
        recipe=recipe,
        policy=policy,
        device=load_device(recipe.device),
        artifacts=folder / "runs",
        command="qdeploy demo",
        reports=(folder / "report.json", folder / "report.html"),
    )
    return sanitize(request, folder / "model.onnx", progress)


def make_poisoned_digits(
    folder: Path, *, seed: int, progress: Progress, attack: str = "demo", bits: int = 4
) -> Path:
    """The path of a poisoned digit classifier, made in `folder` with its card and its data.

    Raises:
        UsageError: scikit-learn is not installed.
        DudError: with this seed the attack does not take.
    """
    request = AttackRequest(
        recipe=load_attack(attack),
        architecture="digits",
        arguments={},
        data=DIGITS,
        test=None,
        bits=bits,
        out=folder,
        artifacts=folder / "runs",
        seed=seed,
    )
    return make(request, progress).path
