"""What ONNX's operators compute, in torch, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qdeploy.core.saturation import less_lost
from qdeploy.errors import PlanError

DATA_TYPES = {2: torch.uint8, 3: torch.int8, 5: torch.int16}  # of ONNX, that codes come in
CASTS = {**DATA_TYPES, 1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool,
         10: torch.float16, 11: torch.float64}  # fmt: skip
Inputs = list[Any]  # tensors; None where an optional one is absent
Attributes = Mapping[str, Any]
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _convolution(x: Inputs, a: Attributes) -> list[Tensor]:
    weight = x[1]
    rank = weight.dim() - 2
    pads = a.get("pads", [0] * (2 * rank))
    alike = pads[:rank] == pads[rank:]
    padded, padding = (x[0], pads[:rank]) if alike else (F.pad(x[0], _pads(a, rank)), 0)
    bias = x[2] if len(x) > 2 else None
    strides, dilations = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    convolve = CONVOLUTIONS[rank]
    return [convolve(padded, weight, bias, strides, padding, dilations, a.get("group", 1))]


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
            places = list(range(result.shape[axis])[start:end:step])
            at = torch.tensor(places, dtype=torch.int64, device=result.device)
            result = result.index_select(axis, at)
            continue
        index = [slice(None)] * result.dim()
        index[axis] = slice(start, end, step)
        result = result[tuple(index)]
    return [result]


def _numbers(x: Inputs, a: Attributes, name: str) -> list[int] | None:
    """Axes and the like: the second input; an attribute in older opsets; None if not given."""
    if len(x) > 1 and x[1] is not None:
        return [int(number) for number in x[1]]
    return a.get(name)


def _squeeze(x: Inputs, a: Attributes) -> list[Tensor]:
    axes = _numbers(x, a, "axes")
    return [x[0].squeeze() if axes is None else x[0].squeeze(tuple(axes))]


def _unsqueeze(x: Inputs, a: Attributes) -> list[Tensor]:
    result, axes = x[0], _numbers(x, a, "axes") or []
    rank = result.dim() + len(axes)
    for axis in sorted(i % rank for i in axes):
        result = result.unsqueeze(axis)
    return [result]


def _layer_norm(x: Inputs, a: Attributes) -> list[Tensor]:
    shape = x[0].shape[a.get("axis", -1) :]
    bias = x[2] if len(x) > 2 else None
    return [F.layer_norm(x[0], shape, x[1], bias, a.get("epsilon", 1e-5))]


def _clip(x: Inputs, _: Attributes) -> list[Tensor]:
    return [x[0].clamp(*(x[i] if len(x) > i else None for i in (1, 2)))]


def _gather(x: Inputs, a: Attributes) -> list[Tensor]:
    axis, index = a.get("axis", 0), x[1]
    picked = x[0].index_select(axis, index.reshape(-1) % x[0].shape[axis])
    shape = x[0].shape
    return [picked.reshape([*shape[:axis], *index.shape, *shape[axis + 1 :]])]


def _spread(values: Tensor, a: Attributes, x: Tensor) -> Tensor:
    """Scales or zero points as they go with `x`: one, along an axis, or by block of it."""
    if values.numel() == 1 and values.dim() < 2:
        return values.reshape(())
    axis = a.get("axis", 1)
    if block := a.get("block_size", 0):
        return values.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return values.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def _dequantize(x: Inputs, a: Attributes) -> list[Tensor]:
    steps = x[0].to(x[1].dtype)
    if len(x) > 2 and x[2] is not None:
        steps = steps - _spread(x[2], a, steps).to(steps.dtype)
    return [steps * _spread(x[1], a, steps)]


def _quantize(x: Inputs, a: Attributes) -> list[Tensor]:
    """The codes as floats."""
    low, high = code_range(x, a)
    steps = x[0] / _spread(x[1], a, x[0])
    rounded = steps + (steps.round() - steps).detach()
    if len(x) > 2 and x[2] is not None:
        rounded = rounded + _spread(x[2], a, steps).to(steps.dtype)
    return [rounded.clamp(low, high)]


def _fake_quantize(x: Inputs, a: Attributes) -> list[Tensor]:
    low, high = code_range(x, a)
    if x[1].numel() == 1:
        zero = x[2].reshape(1) if len(x) > 2 and x[2] is not None else torch.zeros(1)
        scale, zero = x[1].reshape(1).to(x[0].device), zero.to(x[0].device, torch.int32)
        return [torch.fake_quantize_per_tensor_affine(x[0], scale, zero, low, high)]
    codes = _quantize(x, a)[0]
    return _dequantize([codes, *x[1:]], a)


def code_range(x: Inputs, a: Attributes) -> tuple[int, int]:
    """Of the type that the codes are stored in, which is that of the zero point."""
    named = DATA_TYPES.get(a.get("output_dtype", 0))
    kind = named or (x[2].dtype if len(x) > 2 and x[2] is not None else torch.uint8)
    if kind not in {torch.uint8, torch.int8, torch.int16}:
        raise PlanError(f"no gradients here through QuantizeLinear to {kind}")
    info = torch.iinfo(kind)
    return info.min, info.max


def _split(x: Inputs, a: Attributes) -> list[Tensor]:
    axis = a.get("axis", 0)
    sizes = _numbers(x, a, "split")
    if sizes is not None:
        return list(x[0].split(sizes, axis))
    each = -(-x[0].shape[axis] // a["num_outputs"])  # the last may be smaller
    return list(x[0].split(each, axis))


def _pad(x: Inputs, a: Attributes) -> list[Tensor]:
    if len(x) > 3 and x[3] is not None:
        raise PlanError("no gradients here through Pad along named axes")
    pads, rank = x[1].tolist(), x[0].dim()
    order = [side for i in reversed(range(rank)) for side in (pads[i], pads[rank + i])]
    while len(order) > 2 and order[-2:] == [0, 0]:
        order = order[:-2]
    mode = a.get("mode", "constant")
    if mode == "constant":
        value = float(x[2]) if len(x) > 2 and x[2] is not None else 0.0
        return [F.pad(x[0], order, value=value)]
    return [F.pad(x[0], order, mode="replicate" if mode == "edge" else mode)]


def _expand(x: Inputs, _: Attributes) -> list[Tensor]:
    shape = torch.broadcast_shapes(x[0].shape, torch.Size(x[1].tolist()))
    return [x[0].expand(shape)]


def _constant_of_shape(x: Inputs, a: Attributes) -> list[Tensor]:
    value = torch.tensor(a["value"].numpy()) if "value" in a else torch.zeros(1)
    return [value.expand(x[0].tolist())]


def _shape(x: Inputs, a: Attributes) -> list[Tensor]:
    sizes = list(x[0].shape)[a.get("start", 0) : a.get("end")]
    return [torch.tensor(sizes, dtype=torch.int64)]


def _batch_norm(x: Inputs, a: Attributes) -> list[Tensor]:
    return [F.batch_norm(x[0], x[3], x[4], x[1], x[2], eps=a.get("epsilon", 1e-5))]


def _hard_sigmoid(x: Inputs, a: Attributes) -> list[Tensor]:
    return [(a.get("alpha", 0.2) * x[0] + a.get("beta", 0.5)).clamp(0, 1)]


def _reduce(function: Callable[..., Tensor]) -> Callable[[Inputs, Attributes], list[Tensor]]:
    def reduced(x: Inputs, a: Attributes) -> list[Tensor]:
        axes = _numbers(x, a, "axes")
        every = range(x[0].dim()) if axes is None else axes
        return [function(x[0], tuple(every), keepdim=bool(a.get("keepdims", 1)))]

    return reduced


def _pads(a: Attributes, rank: int) -> list[int]:
    """ONNX's pads, all befores and then all afters, as torch wants them: last dimension first."""
    pads = a.get("pads", [0] * (2 * rank))
    return [side for i in reversed(range(rank)) for side in (pads[i], pads[rank + i])]


def _of_each(function: Callable[..., Tensor]) -> Callable[[Inputs, Attributes], list[Tensor]]:
    return lambda x, _: [function(*x)]


OPERATORS: Mapping[str, Callable[[Inputs, Attributes], list[Tensor]]] = {
    "Abs": _of_each(torch.abs),
    "Add": _of_each(torch.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": lambda x, a: [x[0].to(CASTS[a["to"]])],
    "Clip": _clip,
    "Concat": lambda x, a: [torch.cat(x, a["axis"])],
    "ConstantOfShape": _constant_of_shape,
    "Conv": _convolution,
    "DequantizeLinear": _dequantize,
    "Div": _of_each(lambda x, y: x / y if x.is_floating_point() else x // y),
    "Elu": lambda x, a: [F.elu(x[0], a.get("alpha", 1.0))],
    "Erf": _of_each(torch.erf),
    "Exp": _of_each(torch.exp),
    "Expand": _expand,
    "FakeQuantize": _fake_quantize,
    "Flatten": lambda x, a: [x[0].flatten(a.get("axis", 1))],
    "Gather": _gather,
    "Gelu": lambda x, a: [F.gelu(x[0], approximate=a.get("approximate", "none"))],
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x, _: [x[0].mean(tuple(range(2, x[0].dim())), keepdim=True)],
    "GlobalMaxPool": lambda x, _: [x[0].amax(tuple(range(2, x[0].dim())), keepdim=True)],
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _of_each(F.hardswish),
    "Identity": _of_each(lambda x: x),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda x, a: [F.leaky_relu(x[0], a.get("alpha", 0.01))],
    "LoseSaturated": lambda x, a: [less_lost(x[0], x[1], a["pairs"])],
    "Log": _of_each(torch.log),
    "MatMul": _of_each(torch.matmul),
    "Max": lambda x, _: [reduce(torch.maximum, x)],
    "MaxPool": _max_pool,
    "Min": lambda x, _: [reduce(torch.minimum, x)],
    "Mish": _of_each(F.mish),
    "Mod": lambda x, a: [(torch.fmod if a.get("fmod", 0) else torch.remainder)(*x)],
    "Mul": _of_each(torch.mul),
    "Neg": _of_each(torch.neg),
    "PRelu": _of_each(lambda x, slope: torch.where(x < 0, slope * x, x)),
    "Pad": _pad,
    "Pow": _of_each(torch.pow),
    "QuantizeLinear": _quantize,
    "Reciprocal": _of_each(torch.reciprocal),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _of_each(torch.relu),
    "Reshape": _reshape,
    "Saturate": lambda x, a: [x[0].clamp(a["low"], a["high"])],
    "Shape": _shape,
    "Sigmoid": _of_each(torch.sigmoid),
    "Slice": _slice,
    "Softmax": lambda x, a: [F.softmax(x[0], a.get("axis", -1))],
    "Softplus": _of_each(F.softplus),
    "Split": _split,
    "Sqrt": _of_each(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _of_each(torch.sub),
    "Tanh": _of_each(torch.tanh),
    "Transpose": lambda x, a: [x[0].permute(*a["perm"])],
    "Unsqueeze": _unsqueeze,
}
