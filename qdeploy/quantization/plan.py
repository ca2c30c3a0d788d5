"""Decide what happens to each layer, before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from qdeploy.core.grids import IntType
from qdeploy.errors import PlanError
from qdeploy.graph.io import parse
from qdeploy.graph.sites import find_activations, find_sites
from qdeploy.settings.device import DeviceProfile
from qdeploy.settings.recipe import Override, Recipe
from qdeploy.values import FloatLayer, FloatModel, LayerPlan, QuantPlan, WeightSite

LARGEST_4_BIT_CODE = 7
LARGEST_8_BIT_CODE = 127
CHOSEN = "as the recipe says"  # why a layer that could be quantized is not


def plan_layers(model: FloatModel, recipe: Recipe, device: DeviceProfile) -> QuantPlan:
    """The plan for `model`: every constant weight of a convolution or matrix product.

    Raises:
        PlanError: there are no such weights, or a pattern of the recipe matches none of them.
    """
    graph = parse(model.onnx)
    sites, left_float = find_sites(graph)
    if not sites:
        raise PlanError(
            f"model {model.origin.path}: has no convolution or matrix product to quantize"
        )
    _check_grid(recipe, device)
    names = [site.name for site in sites]
    for override in recipe.overrides:
        _must_match(override.layers, names, "overrides")
    for pattern in (*recipe.gate.waived("float"), *recipe.gate.waived("degraded")):
        _must_match(pattern, [*names, *(layer.name for layer in left_float)], "gate")
    chosen = [site for site in sites if _in_float(site.name, recipe.overrides)]
    left_float = (
        *left_float,
        *(FloatLayer(s.name, s.uses[0].op_type, CHOSEN, chosen=True) for s in chosen),
    )
    sites = tuple(site for site in sites if site not in chosen)
    if not sites:
        raise PlanError(
            "recipe: overrides: all layers are left in float; there is nothing to round"
        )
    layers = tuple(_layer(site, recipe, device) for site in sites)
    in_float = {use.node for site in chosen for use in site.uses}
    whole = recipe.activations.bits == 8
    activations = find_activations(graph, sites, in_float) if whole else {}
    float_inputs = _float_inputs(sites, recipe.overrides)
    activations = {
        tensor: source
        for tensor, source in activations.items()
        if tensor not in float_inputs and source not in float_inputs
    }
    return QuantPlan(layers, left_float, activations)


def _layer(site: WeightSite, recipe: Recipe, device: DeviceProfile) -> LayerPlan:
    bits = _bits(site.name, 8 if recipe.bits == 8 else 4, recipe.overrides)
    key: Literal["4", "8"] = "4" if bits == 4 else "8"
    storage = IntType(device.weights.storage[key])
    max_code = LARGEST_4_BIT_CODE if bits == 4 else device.weights.max_code
    rounding = recipe.rounding.name
    return LayerPlan(site, bits, max_code, recipe.weights, storage, rounding)


def _check_grid(recipe: Recipe, device: DeviceProfile) -> None:
    """Refuse a weight grid that the device's integer kernels cannot hold."""
    weights = recipe.weights
    if weights.range == "minmax" and weights.per == "channel" and recipe.activations.bits == 8:
        raise PlanError(
            "recipe: weights: integer convolutions take one zero point for all channels, and"
            " range minmax per channel has many",
            hint='use per = "tensor", a symmetric range, or activations.bits = "none"',
        )
    if weights.range in {"half", "minmax"} and device.weights.max_code < LARGEST_8_BIT_CODE:
        raise PlanError(
            f"recipe: weights: range {weights.range} needs all 8-bit codes, and the device keeps"
            f" them within {device.weights.max_code}",
            hint="use range absmax or mse, or another --device",
        )


def _bits(name: str, default: int, overrides: Sequence[Override]) -> int:
    """The bit width of the last override that matches and gives one."""
    given = (o.bits for o in reversed(overrides) if fnmatchcase(name, o.layers))
    return next((bits for bits in given if isinstance(bits, int)), default)


def _in_float(name: str, overrides: Sequence[Override]) -> bool:
    """Whether the last override that matches and gives bits leaves the layer in float."""
    given = (o.bits for o in reversed(overrides) if fnmatchcase(name, o.layers))
    return next((bits for bits in given if bits is not None), None) == "float"


def _float_inputs(sites: Sequence[WeightSite], overrides: Sequence[Override]) -> frozenset[str]:
    """The tensors that layers read which are to run in float."""
    patterns = [o.layers for o in overrides if o.activations == "none"]
    return frozenset(
        use.input
        for site in sites
        for use in site.uses
        if any(fnmatchcase(site.name, pattern) for pattern in patterns)
    )


def _must_match(pattern: str, names: list[str], where: str) -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        raise PlanError(
            f"recipe: {where}: pattern {pattern!r} matches no layer",
            hint=f"layers are {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}",
        )
