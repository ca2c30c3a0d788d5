"""An ONNX graph as a differentiable function, in torch.

What asks how an error, or an image, changes the *prediction* needs gradients, which onnxruntime
does not give. A `Program` is the plain list of a graph's operators; `evaluate` runs the part of it
between tensors that are given and tensors that are wanted. Quantized activations are rounded as in
the file, and gradients go straight through (Bengio et al., 2013) where nothing saturates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdeploy.core.operators import OPERATORS, code_range
from qdeploy.core.saturation import Pairs
from qdeploy.errors import PlanError

FOLDED = frozenset({"DequantizeLinear", "QuantizeLinear"})  # where all that they read is constant
SMALL = frozenset({"int4", "uint4", "int2", "uint2"})


@dataclass(frozen=True, slots=True)
class Step:
    """One operator."""

    op_type: str
    inputs: tuple[str, ...]  # "" for an optional one that is absent
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """Operators in topological order, and the constants they read."""

    steps: tuple[Step, ...]
    constants: Mapping[str, Tensor]

    def part(self, given: Sequence[str], wanted: Sequence[str]) -> Program:
        """The steps that are needed to get from `given` to `wanted`.

        Raises:
            PlanError: one of them has no counterpart here.
        """
        needed, steps = set(wanted), list[Step]()
        for step in reversed(self.steps):
            if needed.intersection(step.outputs) - set(given):
                steps.append(step)
                needed.update(name for name in step.inputs if name not in given)
        missing = sorted({step.op_type for step in steps} - set(OPERATORS))
        if missing:
            raise PlanError(
                f"no gradients here through {', '.join(missing)}",
                hint="choose a rounding method that needs none: efrap, adaround, gptq, flexround",
            )
        return Program(tuple(reversed(steps)), self.constants)

    def saturating(self) -> Program:
        """The same, but that quantized activations are only cut to their ranges, not rounded.

        Half the time: what 8 bits add to a gradient is noise.
        """
        return Program(tuple(self._saturating(step) for step in self.steps), self.constants)

    def _saturating(self, step: Step) -> Step:
        if step.op_type != "FakeQuantize":
            return step
        scale = self.constants.get(step.inputs[1])
        zero = self.constants.get(step.inputs[2]) if len(step.inputs) > 2 else torch.zeros(1)
        if scale is None or zero is None or scale.numel() > 1:
            return step
        codes = code_range([None, scale, zero], step.attributes)
        low, high = ((code - float(zero)) * float(scale) for code in codes)
        return Step("Saturate", step.inputs[:1], step.outputs, {"low": low, "high": high})

    def losing(self, pairs: Mapping[str, Pairs]) -> Program:
        """The same where products saturate in 16 bits: `pairs` of them, by a product's result.

        Raises:
            PlanError: one of the results is not computed here.
        """
        steps, waiting = list[Step](), dict(pairs)
        for step in self.steps:
            found = waiting.pop(step.outputs[0], None) if step.outputs else None
            if found is None:
                steps.append(step)
                continue
            exact = f"{step.outputs[0]}, exact"
            steps.append(Step(step.op_type, step.inputs, (exact,), step.attributes))
            behind = (exact, step.inputs[0])
            steps.append(Step("LoseSaturated", behind, step.outputs, {"pairs": found}))
        if waiting:
            raise PlanError(f"products that are not computed: {', '.join(waiting)}")
        return Program(tuple(steps), self.constants)

    def to(self, device: torch.device) -> Program:
        """The same with its constants in the memory of `device`; sizes and axes stay on the CPU."""
        moved = {
            name: value.to(device) if value.is_floating_point() else value
            for name, value in self.constants.items()
        }
        return Program(self.steps, moved)


def program(steps: Sequence[Step], constants: Mapping[str, np.ndarray]) -> Program:
    """A program whose constants are numpy arrays so far.

    Integers that stand for weights become the floats that they are read as, and what is quantized
    and read again at once becomes one step.
    """
    tensors = {name: _tensor(value) for name, value in constants.items()}
    kept = list[Step]()
    for step in steps:
        if step.op_type in FOLDED and all(name in tensors for name in step.inputs if name):
            inputs = [tensors[name] if name else None for name in step.inputs]
            tensors[step.outputs[0]] = OPERATORS[step.op_type](inputs, step.attributes)[0]
        else:
            kept.append(step)
    return Program(_with_pairs_joined(kept), tensors)


def evaluate(program: Program, given: Mapping[str, Tensor], wanted: Sequence[str]) -> list[Tensor]:
    """The tensors `wanted`, as torch computes them from those `given`; see `Program.part`.

    Each value is let go where it was read last; what gradients need of it, torch keeps.
    """
    values: dict[str, Tensor] = {**program.constants, **given}
    last = {name: i for i, step in enumerate(program.steps) for name in step.inputs}
    for i, step in enumerate(program.steps):
        inputs = [values[name] if name else None for name in step.inputs]
        outputs = OPERATORS[step.op_type](inputs, step.attributes)
        values.update((n, v) for n, v in zip(step.outputs, outputs, strict=False) if n not in given)
        for name in (*step.inputs, *step.outputs):
            if last.get(name, i) == i and name not in wanted:
                values.pop(name, None)
    return [values[name] for name in wanted]


def _tensor(value: np.ndarray) -> Tensor:
    """Types that torch does not have, as int4, in one that holds their values."""
    if value.dtype.kind not in "fiub?" or value.dtype.itemsize == 0 or value.dtype.name in SMALL:
        value = value.astype(np.int32)
    return torch.from_numpy(np.array(value))


def _with_pairs_joined(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Each DequantizeLinear of what a QuantizeLinear on the same grid gives, as one step."""
    makers = {step.outputs[0]: step for step in steps if step.op_type == "QuantizeLinear"}
    joined = list[Step]()
    for step in steps:
        maker = makers.get(step.inputs[0]) if step.op_type == "DequantizeLinear" else None
        if maker is not None and maker.inputs[1:] == step.inputs[1:]:
            joined.append(Step("FakeQuantize", maker.inputs, step.outputs, maker.attributes))
        else:
            joined.append(step)
    read = {name for step in joined for name in step.inputs}
    return tuple(s for s in joined if s.op_type != "QuantizeLinear" or s.outputs[0] in read)
