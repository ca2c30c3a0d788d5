"""A float ONNX graph as a differentiable function, in torch.

Methods that ask what an error does to the *prediction* need gradients, which onnxruntime does not
give. A `Program` is the plain list of a graph's operators; `evaluate` runs the part of it between
tensors that are given and tensors that are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qdeploy.errors import PlanError


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


def program(steps: Sequence[Step], constants: Mapping[str, np.ndarray]) -> Program:
    """A program whose constants are numpy arrays so far."""
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in constants.items()}
    return Program(tuple(steps), tensors)


def evaluate(program: Program, given: Mapping[str, Tensor], wanted: Sequence[str]) -> list[Tensor]:
    """The tensors `wanted`, as torch computes them from those `given`; see `Program.part`."""
    values: dict[str, Tensor] = {**program.constants, **given}
    for step in program.steps:
        inputs = [values[name] if name else None for name in step.inputs]
        outputs = OPERATORS[step.op_type](inputs, step.attributes)
        made = dict(zip(step.outputs, outputs, strict=False))
        values = {**values, **made, **given}
    return [values[name] for name in wanted]


Inputs = list[Any]  # tensors; None where an optional one is absent
Attributes = Mapping[str, Any]
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _convolution(x: Inputs, a: Attributes) -> list[Tensor]:
    weight = x[1]
    rank = weight.dim() - 2
    padded = F.pad(x[0], _pads(a, rank))
    bias = x[2] if len(x) > 2 else None
    strides, dilations = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    convolve = CONVOLUTIONS[rank]
    return [convolve(padded, weight, bias, strides, 0, dilations, a.get("group", 1))]


def _gemm(x: Inputs, a: Attributes) -> list[Tensor]:
    left = x[0].T if a.get("transA", 0) else x[0]
    right = x[1].T if a.get("transB", 0) else x[1]
    product = a.get("alpha", 1.0) * (left @ right)
    return [product if len(x) < 3 or x[2] is None else product + a.get("beta", 1.0) * x[2]]


def _max_pool(x: Inputs, a: Attributes) -> list[Tensor]:
    rank = len(a["kernel_shape"])
    padded = F.pad(x[0], _pads(a, rank), value=-torch.inf)
    strides, dilations = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    ceil = bool(a.get("ceil_mode", 0))
    return [MAX_POOLS[rank](padded, a["kernel_shape"], strides, 0, dilations, ceil)]


def _average_pool(x: Inputs, a: Attributes) -> list[Tensor]:
    rank = len(a["kernel_shape"])
    pads = _pads(a, rank)
    if rank != 2 or len(set(pads)) > 1 or a.get("ceil_mode", 0):
        raise PlanError(f"no gradients here through AveragePool with pads {pads}")
    counted = bool(a.get("count_include_pad", 0))
    strides = a.get("strides", [1] * rank)
    return [F.avg_pool2d(x[0], a["kernel_shape"], strides, pads[0], False, counted)]


def _reshape(x: Inputs, a: Attributes) -> list[Tensor]:
    sizes = x[1].tolist()
    kept = not a.get("allowzero", 0)
    return [x[0].reshape([x[0].shape[i] if s == 0 and kept else s for i, s in enumerate(sizes)])]


def _slice(x: Inputs, _: Attributes) -> list[Tensor]:
    result = x[0]
    starts, ends = x[1].tolist(), x[2].tolist()
    axes = x[3].tolist() if len(x) > 3 and x[3] is not None else range(len(starts))
    steps = x[4].tolist() if len(x) > 4 and x[4] is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            raise PlanError("no gradients here through Slice with a negative step")
        index = [slice(None)] * result.dim()
        index[axis] = slice(start, end, step)
        result = result[tuple(index)]
    return [result]


def _squeeze(x: Inputs, _: Attributes) -> list[Tensor]:
    return [x[0].squeeze(tuple(x[1].tolist())) if len(x) > 1 else x[0].squeeze()]


def _unsqueeze(x: Inputs, _: Attributes) -> list[Tensor]:
    result = x[0]
    rank = result.dim() + x[1].numel()
    for axis in sorted(int(i) % rank for i in x[1]):
        result = result.unsqueeze(axis)
    return [result]


def _layer_norm(x: Inputs, a: Attributes) -> list[Tensor]:
    shape = x[0].shape[a.get("axis", -1) :]
    bias = x[2] if len(x) > 2 else None
    return [F.layer_norm(x[0], shape, x[1], bias, a.get("epsilon", 1e-5))]


def _reduce_mean(x: Inputs, a: Attributes) -> list[Tensor]:
    axes = tuple(x[1].tolist()) if len(x) > 1 and x[1] is not None else tuple(range(x[0].dim()))
    return [x[0].mean(axes, keepdim=bool(a.get("keepdims", 1)))]


def _clip(x: Inputs, _: Attributes) -> list[Tensor]:
    return [x[0].clamp(*(x[i] if len(x) > i else None for i in (1, 2)))]


def _gather(x: Inputs, a: Attributes) -> list[Tensor]:
    axis, index = a.get("axis", 0), x[1]
    picked = x[0].index_select(axis, index.reshape(-1) % x[0].shape[axis])
    shape = x[0].shape
    return [picked.reshape([*shape[:axis], *index.shape, *shape[axis + 1 :]])]


def _pads(a: Attributes, rank: int) -> list[int]:
    """ONNX's pads, all befores and then all afters, as torch wants them: last dimension first."""
    pads = a.get("pads", [0] * (2 * rank))
    return [side for i in reversed(range(rank)) for side in (pads[i], pads[rank + i])]


def _of_each(function: Callable[..., Tensor]) -> Callable[[Inputs, Attributes], list[Tensor]]:
    return lambda x, _: [function(*x)]


OPERATORS: Mapping[str, Callable[[Inputs, Attributes], list[Tensor]]] = {
    "Add": _of_each(torch.add),
    "AveragePool": _average_pool,
    "Clip": _clip,
    "Concat": lambda x, a: [torch.cat(x, a["axis"])],
    "Conv": _convolution,
    "Div": _of_each(torch.div),
    "Erf": _of_each(torch.erf),
    "Flatten": lambda x, a: [x[0].flatten(a.get("axis", 1))],
    "Gather": _gather,
    "Gelu": lambda x, a: [F.gelu(x[0], approximate=a.get("approximate", "none"))],
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x, _: [x[0].mean(tuple(range(2, x[0].dim())), keepdim=True)],
    "HardSwish": _of_each(F.hardswish),
    "Identity": _of_each(lambda x: x),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda x, a: [F.leaky_relu(x[0], a.get("alpha", 0.01))],
    "MatMul": _of_each(torch.matmul),
    "MaxPool": _max_pool,
    "Mul": _of_each(torch.mul),
    "ReduceMean": _reduce_mean,
    "Relu": _of_each(torch.relu),
    "Reshape": _reshape,
    "Sigmoid": _of_each(torch.sigmoid),
    "Slice": _slice,
    "Softmax": lambda x, a: [F.softmax(x[0], a.get("axis", -1))],
    "Squeeze": _squeeze,
    "Sub": _of_each(torch.sub),
    "Tanh": _of_each(torch.tanh),
    "Transpose": lambda x, a: [x[0].permute(*a["perm"])],
    "Unsqueeze": _unsqueeze,
}
