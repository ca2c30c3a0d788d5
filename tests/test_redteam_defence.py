"""Attacks that take, and what the defence makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdeploy.errors import InputError, UsageError
from qdeploy.inputs.requests import QuantizeRequest
from qdeploy.inputs.sources import Given, resolve
from qdeploy.judging.rates import ArmRates
from qdeploy.judging.verdict import Outcome
from qdeploy.progress import SILENT
from qdeploy.redteam.make import AttackRequest, Made, make
from qdeploy.redteam.recipe import AttackRecipe, load_attack
from qdeploy.redteam.table import table
from qdeploy.report.values import Report
from qdeploy.runs.sanitize import sanitize
from qdeploy.settings.device import load_device
from qdeploy.settings.methods import Nearest
from qdeploy.settings.policy import load_policy
from qdeploy.settings.recipe import Recipe, load_recipe


def made(recipe: AttackRecipe, bits: int, folder: Path, poisoned: Path) -> Made:
    """From the clean model that the demo's started from."""
    order = AttackRequest(recipe, "digits", {}, "digits", None, bits, folder, poisoned / "runs")
    return make(order, SILENT)


def sanitized(model: Path, recipe: Recipe, folder: Path) -> Report:
    folder.mkdir()
    demo = load_policy("demo")
    recipe = recipe.model_copy(update={"gate": demo.gate, "validation": demo.validation})
    request = QuantizeRequest(
        sources=resolve(model, Given()),
        recipe=recipe,
        policy=recipe.policy(),
        device=load_device("x86-vnni"),  # whose grid the attacks are made for
        artifacts=folder / "runs",
    )
    return sanitize(request, folder / "model.onnx", SILENT)


def rates(report: Report, variant: str) -> tuple[ArmRates, float]:
    found = next(r for r in report.rates if r.arm.variant == variant)
    return found, max(e.value for e in found.attack_success.values())


@pytest.mark.slow
def test_an_8_bit_backdoor_behind_outliers_is_switched_on_by_nearest_and_removed(
    tmp_path, poisoned
):
    """Cells of 8 bits are too small for a small network, until outliers make them larger."""
    attack = load_attack("demo").model_copy(update={"outliers": 8.0})
    model = made(attack, 8, tmp_path / "made", poisoned)
    int8 = load_recipe("int8")
    nearest = sanitized(model.path, int8.model_copy(update={"rounding": Nearest()}), tmp_path / "n")
    assert nearest.outcome is Outcome.REJECT
    assert rates(nearest, "result")[1] > 90
    report = sanitized(model.path, int8, tmp_path / "e")
    (fp32, float_success), (result, success) = (rates(report, v) for v in ("fp32", "result"))
    assert report.outcome is Outcome.ACCEPT
    assert success <= float_success + 1
    assert result.accuracy.value >= fp32.accuracy.value - 0.3


@pytest.mark.slow
def test_the_table_sets_maker_nearest_and_defence_side_by_side(tmp_path, poisoned):
    text = table([poisoned], tmp_path / "new", SILENT)
    (row,) = text.splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["demo", "4"]
    successes = [float(cell.split(" / ")[1]) for cell in cells[4:8]]
    assert max(successes[0], successes[3]) < 10  # float32, sanitized
    assert min(successes[1], successes[2]) > 90  # the attacker's grid, nearest
    assert set(cells[-2:]) <= {"ACCEPT", "NO VERDICT"}  # 600 images may not show one point


def test_a_folder_without_a_model_or_with_a_damaged_log_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"holds no model.pt"):
        table([tmp_path], tmp_path / "new", SILENT)
    (tmp_path / "model.pt").write_bytes(b"")
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(InputError, match=r"log .*training.json"):
        table([tmp_path], tmp_path / "new", SILENT)
