"""What `--dry-run` shows: the plan, and what a verdict on it takes."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from qdeploy.cli.console import out, show_misfit
from qdeploy.core.metrics import images_for
from qdeploy.disk.printable import printable
from qdeploy.settings.checks import CHECKS, ROWS
from qdeploy.settings.device import DeviceProfile, misfit
from qdeploy.settings.policy import GateSpec
from qdeploy.settings.recipe import Recipe
from qdeploy.values import FloatModel, QuantPlan


def show_plan(model: FloatModel, plan: QuantPlan, recipe: Recipe, device: DeviceProfile) -> None:
    """What would be done, layer by layer, and what would be checked."""
    console = out()
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="bold")
    for column in ("layer", "operator", "weight", "bits", "codes", "stored as", "rounding"):
        table.add_column(column)
    for layer in plan.layers:
        table.add_row(
            Text(printable(layer.site.name)), layer.site.uses[0].op_type,
            "x".join(map(str, layer.site.shape)), str(layer.bits),
            f"{-layer.max_code}..{layer.max_code}", layer.storage.value, layer.rounding,
        )  # fmt: skip
    for left in plan.left_float:
        table.add_row(
            Text(printable(left.name)),
            left.op_type,
            "",
            "32",
            "",
            "float32",
            printable(left.reason),
        )
    console.print(table)
    gate = recipe.gate
    runs = ", ".join(runtime.label for runtime in device.runtimes)
    console.print(
        f"\n  {len(plan.activations)} activation tensors in uint8"
        if plan.activations else "\n  activations in float"
    )  # fmt: skip
    console.print(
        f"  recipe {printable(recipe.name)}, device {printable(device.name)} ({runs}),"
        f" seed {recipe.seed}"
    )
    show_misfit(misfit(device))
    console.print(
        "  limits: "
        + ", ".join(
            f"{row.name} {row.relation} {limit:g} {row.unit}"
            for row in ROWS
            if (limit := gate.limit(row, device.budget)) is not None
        )
    )
    if recipe.bits == "auto":
        console.print("  bits: from these up to 8, layer after layer, by measuring: --bits auto")
    console.print(f"  test images: {_images_needed(gate, device)}")
    console.print(f"  required: {', '.join(sorted(gate.required))}")
    console.print(
        f"  required once a trigger is known: {', '.join(sorted(gate.required_with_trigger))}"
    )
    console.print(f"  model {printable(model.origin.path)}, {model.classes} classes")


def _images_needed(gate: GateSpec, device: DeviceProfile) -> str:
    """How many a verdict takes, so that nobody learns it after the run."""
    least = f"at least {gate.min_images}"
    limit = gate.limit(CHECKS["agreement"], device.budget)
    if limit is None:
        return least
    count = images_for(limit, points=1.0)
    return f"{least}; with {count:,} the agreement is known to within a point at its limit"
