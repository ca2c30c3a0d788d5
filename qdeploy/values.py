"""The values that travel from stage to stage, all frozen. A model is its serialized ONNX bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from qdeploy.core.grids import Grid, IntType
from qdeploy.core.patches import Window
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.settings.card import Layout
from qdeploy.settings.recipe import WeightGridSpec

# Operators whose float weights onnxruntime rounds itself, where they lie between integers.
ROUNDED_AT_LOAD = frozenset({"Conv", "ConvTranspose", "Gemm"})
# Operators that it moves grids past, or takes out; and those that it makes part of such a node.
MOVED_AT_LOAD = frozenset({
    "Relu", "Clip", "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice",
    "Expand", "Identity", "Dropout", "Cast", "Pad",
})  # fmt: skip
FUSED_AT_LOAD = frozenset({"Add", "Sub", "Mul", "Div", "BatchNormalization"})  # with constants
STANDARD_DOMAINS = frozenset({"", "ai.onnx"})  # of operators that the ONNX standard defines


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a model came from."""

    path: str
    sha256: str
    format: str
    architecture: str | None = None


Content = Literal["onnx", "module", "script", "program"]


SHAPE_HINT = (
    "say it: --input-shape 3,224,224 (channels, height, width), or [input] shape in a model card"
)
ARCHITECTURE_HINT = (
    "give --arch file.py:factory or --arch package.module:factory, or name one in the model card"
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """The code that goes with a state dict.

    `trusted` names come from the command line and may be any importable code; a card's may not.
    """

    name: str
    arguments: Mapping[str, Any]
    trusted: bool


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """An opened model: an ONNX message, a torch module in eval mode, or a program of torch's."""

    origin: Origin
    content: Any
    kind: Content


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a file that was seen without running it."""

    rule: str  # kebab-case, stable
    level: Literal["error", "warning", "note"]  # error: no classifier has any business with it
    where: str  # tensor, node or archive member; empty for the whole file
    message: str


@dataclass(frozen=True, slots=True)
class FloatModel:
    """A prepared float32 classifier: one image input with a dynamic batch, one output of logits."""

    onnx: bytes
    origin: Origin
    input_name: str
    input_shape: tuple[int, int, int]  # channels, height, width
    output_name: str
    classes: int
    other_ends: bool = False  # the file that came takes or gives something else than this

    @property
    def interface(self) -> Interface:
        return Interface(self.input_shape, self.classes)


LARGEST_INPUT_VALUES = 1 << 26  # of one image; what claims more is no image


@dataclass(frozen=True, slots=True)
class Interface:
    """What a classifier takes and gives."""

    input_shape: tuple[int, int, int]  # channels, height, width
    classes: int


@dataclass(frozen=True, slots=True)
class Stated:
    """What the user or a card says of a model's ends, where the file does not, or is doubted."""

    shape: tuple[int, int, int] | None = None  # of the input: channels, height, width
    layout: Layout | None = None  # of the file's input
    output: str | None = None  # the one that holds the classes
    pixel_range: tuple[float, float] | None = None  # what becomes of pixels of 0 and 255


NOTHING_STATED = Stated()


@dataclass(frozen=True, slots=True)
class WeightUse:
    """One node that multiplies by a weight."""

    node: str
    op_type: Literal["Conv", "Gemm", "MatMul"]
    input: str
    output: str
    bias: str | None  # initializer
    takes_bias: bool  # MatMul does not
    activation: str | None  # tensor after the ReLU that alone follows it, if one does
    window: Window | None  # of a convolution


@dataclass(frozen=True, slots=True)
class WeightSite:
    """A constant weight and the nodes that share it."""

    name: str
    weight: str  # initializer
    shape: tuple[int, ...]
    axis: int  # output channels
    groups: int
    uses: tuple[WeightUse, ...]

    def to_matrix(
        self, weight: Float32[np.ndarray, "*shape"]
    ) -> Float32[np.ndarray, "groups rows fan_in"]:
        """The weight with one row per output channel."""
        rows = np.moveaxis(weight, self.axis, 0).reshape(weight.shape[self.axis], -1)
        return np.ascontiguousarray(rows.reshape(self.groups, -1, rows.shape[1]))

    def from_matrix(
        self, matrix: Int32[np.ndarray, "groups rows fan_in"]
    ) -> Int32[np.ndarray, "*shape"]:
        """Codes in the layout of the weight: the inverse of `to_matrix`."""
        channels = self.shape[self.axis]
        others = tuple(size for i, size in enumerate(self.shape) if i != self.axis)
        return np.ascontiguousarray(np.moveaxis(matrix.reshape(channels, *others), 0, self.axis))


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What is to be done with one weight: pure intent."""

    site: WeightSite
    bits: int
    max_code: int
    grid: WeightGridSpec
    storage: IntType
    rounding: str

    def problem(self, weight: Float32[np.ndarray, "*shape"], grid: Grid) -> RoundingProblem:
        """The rounding problem of this layer when its float weight is `weight`."""
        scale, zero_point = (
            values.reshape(self.site.groups, -1) for values in (grid.scale, grid.zero_point)
        )
        return RoundingProblem(self.site.to_matrix(weight), scale, zero_point, grid.low, grid.high)


@dataclass(frozen=True, slots=True)
class FloatLayer:
    """A node with weights that stay float: nothing here can quantize it, or it was so chosen."""

    name: str
    op_type: str
    reason: str
    chosen: bool = False  # by the recipe, and not for want of a way


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """What is to be done with a model; printable before any work."""

    layers: tuple[LayerPlan, ...]
    left_float: tuple[FloatLayer, ...]
    activations: Mapping[str, str]  # tensor to be quantized -> the tensor whose grid it shares

    @property
    def ranged(self) -> tuple[str, ...]:
        """The tensors whose ranges must be known."""
        return tuple(sorted(set(self.activations.values())))


@dataclass(frozen=True, slots=True)
class Grids:
    """Every scale and zero point of a quantized model, fixed before any weight is rounded."""

    weights: Mapping[str, Grid]  # by layer name
    activations: Mapping[str, Grid]  # by tensor; empty for weights only


@dataclass(frozen=True, slots=True, eq=False)
class RoundedLayer:
    """The codes chosen for one weight, and what is known about the choice."""

    name: str
    codes: Int32[np.ndarray, "*shape"]  # in the layout of the weight
    rounding_used: str
    degraded: str | None  # why the planned method was not used
    flipped: float  # share of codes that differ from nearest rounding
    output_error: float  # mean squared output error over the output's variance; nan: not measured
    nearest_error: float  # the same for nearest rounding
    bias_corrections: tuple[Float64[np.ndarray, " channels"], ...]  # one per use; empty for none
    seconds: float

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.codes.astype("<i4").tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """A QDQ model whose weights are integers."""

    onnx: bytes
    layers: tuple[RoundedLayer, ...]
    left_float: tuple[FloatLayer, ...]
    misfit: str | None = None  # what of the device's figures this machine cannot give


Variant = Literal["source", "fp32", "nearest", "result"]


@dataclass(frozen=True, slots=True)
class Arm:
    """One file on one runtime."""

    variant: Variant
    runtime: str  # as `RuntimeSpec.label` has it


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """Clean images on one runtime, beside the same on the device's first."""

    same: Bool[np.ndarray, " asked"]  # whether the class is; fewer than all may have been asked
    difference: float | None  # largest of a logit, percent of their range; None: not all finite
    early: bool = False  # whether no more were asked because the answer was clear


NOT_FINITE, UNASKED = -1, -2  # where the logits are no numbers; where nobody has asked


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What every arm answered: a class per image, or `NOT_FINITE`, or `UNASKED`."""

    labels: Int64[np.ndarray, " images"]
    clean: Mapping[Arm, Int32[np.ndarray, " images"]]
    triggered: Mapping[
        str, Mapping[Arm, Int32[np.ndarray, " images"]]
    ]  # trigger -> arm -> all images
    targets: Mapping[str, int]  # trigger -> its class
    ranks: Mapping[Arm, Int32[np.ndarray, " images"]] = field(
        default_factory=dict
    )  # how many classes the clean image's own comes after
    compared: Mapping[Arm, Compared] = field(default_factory=dict)  # the result, on other runtimes

    def asked(self, arm: Arm) -> Bool[np.ndarray, " images"]:
        """The images that an arm was asked about, clean and with those triggers that concern it."""
        return self.clean[arm] != UNASKED


@dataclass(frozen=True, slots=True)
class Latency:
    """Median seconds per run of one variant, alternated with the others in one loop."""

    variant: Variant
    batch: int
    seconds: float
    runs: int
    low: float  # 95 % confidence interval of the median
    high: float


@dataclass(frozen=True, slots=True)
class FileMade:
    """One of the files that were measured, as it lay on disk."""

    variant: Variant
    sha256: str
    size_bytes: int
    kernels: Mapping[str, int]  # operators the CPU runtime really runs


@dataclass(frozen=True, slots=True)
class Converted:
    """The judged file in another format, as it was measured and written."""

    format: str
    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StageTime:
    """How long a stage of a run took."""

    name: str
    seconds: float
    cpu_seconds: float | None = None  # of all threads; None where nobody has counted


Explanation = Literal["nearest", "as reported", "unexplained"]  # how a layer's integers came about


@dataclass(frozen=True, slots=True)
class DataUsed:
    """A set of images, or the triggers, that a run relied on."""

    role: str
    name: str
    images: int | None
    sha256: str | None
    given_by: str  # "model card", "command line" or how it was made


def named_classes(classes: Sequence[int], names: Sequence[str]) -> str:
    """The classes by name, by number where the card has no names; "none" for none."""
    return ", ".join(names[c] if c < len(names) else f"class {c}" for c in classes) or "none"


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What one layer's rounding alone does to the logits."""

    layer: str
    weights: int
    four_bits: float  # mean squared error that 4 bits add, over the logits' variance
    input: float  # the same of its input on an 8-bit grid; 0 if that stays float anyway


@dataclass(frozen=True, slots=True)
class BitSearch:
    """How bits were given to layers, and by what."""

    layers: tuple[Sensitivity, ...]
    average_bits: float  # of a weight
    agreement: float  # percent of the calibration images, of the choice
    wanted: float
    rounding: str  # that was measured with: the recipe's, or one whose layers are independent


@dataclass(frozen=True, slots=True)
class HardeningRound:
    """One time that all integers were chosen again against what a search had found."""

    classes: tuple[int, ...]  # that something led to
    before: float  # percent of held-out images that the best perturbation led
    after: float  # that the best of a new search led
    still: float  # that the best of those found before still led, of other images
    moved: float  # share of all integers
    seconds: float
    failed: str | None = None  # why it did not come to an end; the file is then as it was


@dataclass(frozen=True, slots=True)
class Cleaning:
    """What a sanitizer did to the float model before it was quantized."""

    origin: Origin  # of the model as it was given
    sanitizer: Mapping[str, Any]  # its settings
    images: DataUsed
    student: str  # where the cleaned model lies
    epochs: int
    suspicious: tuple[int, ...] | None  # classes reached too easily; None: not looked for
    remaining: tuple[int, ...] | None  # those of the cleaned model
    agreement: float  # percent of (at most 1,000 of) the images with the same answer as before
    seconds: float
