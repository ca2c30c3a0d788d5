"""Torch networks of the common families come out as graphs that run in integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdeploy.data import Images, Preprocessing, images_from_array
from qdeploy.errors import InputError, UsageError
from qdeploy.exporting.exporter import export
from qdeploy.formats.onnx.nodes import operators
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.emit import emit
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask, round_layers
from qdeploy.runtime.sessions import open_session, optimized
from qdeploy.settings.device import load_device
from qdeploy.settings.recipe import load_recipe
from qdeploy.values import Content, FloatModel, Loaded, Origin, QuantizedModel, Stated

SHAPE = (3, 16, 16)


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * channels
        self.shortcut = stride == 1 and channels == out
        self.conv = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


def mobilenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        InvertedResidual(8, 12, 2), InvertedResidual(12, 12, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 10),
    )  # fmt: skip


def alexnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(64, 32),
        nn.ReLU(), nn.Dropout(), nn.Linear(32, 10),
    )  # fmt: skip


class DenseNet(nn.Module):
    """BatchNorm in front of convolutions, and concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.norm = nn.BatchNorm2d(8)
        self.grow = nn.Conv2d(8, 8, 3, 1, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.grow(F.relu(self.norm(x)))], 1)
        return self.fc(F.avg_pool2d(x, 16).flatten(1))


class SqueezeExcite(nn.Module):
    """Hard-swish and a gate, as in MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        gate = self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return self.fc((x * torch.sigmoid(gate)).mean([2, 3]))


class Transformer(nn.Module):
    """Patches, attention and LayerNorm: matrix products with and without weights."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5).softmax(-1)
        x = x + self.out((attention @ v).transpose(1, 2).reshape(batch, tokens, width))
        return self.fc((x + self.mlp(self.norm2(x))).mean(1))


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """With weights and BatchNorm statistics as if it had been trained."""
    torch.manual_seed(0)
    module = make().train()
    with torch.no_grad():
        for _ in range(10):
            module(torch.randn(16, *SHAPE))
    return module.eval()


def exported(module: nn.Module, kind: Content = "module") -> FloatModel:
    return export(Loaded(Origin("net.pt", "", kind), module, kind), stated=Stated(SHAPE))


@pytest.fixture(scope="module")
def pictures() -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (64, *SHAPE), dtype=np.uint8)
    return images_from_array("random", pixels, Preprocessing(SHAPE, (0.5,) * 3, (0.25,) * 3))


def quantized(model: FloatModel, images: Images) -> QuantizedModel:
    recipe, device = load_recipe("int8"), load_device("x86-vnni")
    plan = plan_layers(model, recipe, device)
    grids = calibrate(model, plan, images, recipe.activations)
    task = RoundingTask(model, plan, grids, images, 0)
    return emit(model, plan, grids, round_layers(task, recipe.rounding))


@pytest.mark.parametrize(
    ("make", "float_kernels"),
    [
        (mobilenet, set()),
        (alexnet, set()),
        (DenseNet, set()),
        (SqueezeExcite, {"HardSigmoid", "Mul"}),  # hard-swish has no integer kernel
        (Transformer, {"Add", "LayerNormalization", "Mul", "com.microsoft.BiasGelu", "ReduceMean"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_network_is_exported_quantized_and_runs_in_integers(pictures, make, float_kernels):
    model = exported(trained(make))
    result = quantized(model, pictures)
    assert not result.left_float
    moving = {"Reshape", "Flatten", "Transpose", "Squeeze", "Split", "Concat", "Shape", "Slice"}
    conversions = {"QuantizeLinear", "DequantizeLinear", "Softmax"}
    runs = set(operators(optimized(result.onnx)))
    integer = {name for name in runs if "QLinear" in name or "QGemm" in name or "Nhwc" in name}
    assert runs - integer - moving - conversions - {"Gather"} <= float_kernels
    x = pictures.preprocessing.normalise(next(pictures.batches(64)).pixels)
    want, got = open_session(model.onnx).logits(x), open_session(result.onnx).logits(x)
    assert np.square(want - got).mean() < 0.05 * want.var()


@pytest.mark.parametrize("make", [mobilenet, alexnet, DenseNet])
def test_torchscript_gives_the_same_graph_of_operators(make):
    module = trained(make)
    scripted = exported(torch.jit.script(module), "script")
    plain = exported(module)
    x = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)
    np.testing.assert_allclose(
        open_session(scripted.onnx).logits(x), open_session(plain.onnx).logits(x),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip
    assert operators(scripted.onnx).count("Conv") == operators(plain.onnx).count("Conv")


def test_an_exported_program_becomes_the_same_classifier():
    module = trained(mobilenet)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(module, (torch.zeros(2, *SHAPE),), dynamic_shapes=(batch,))
    model = export(Loaded(Origin("net.pt2", "", ""), program, "program"), stated=Stated(SHAPE))
    x = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)
    with torch.no_grad():
        want = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(open_session(model.onnx).logits(x), want, rtol=1e-3, atol=1e-4)


def test_exporting_twice_gives_the_same_bytes():
    module = trained(mobilenet)
    assert exported(module).onnx == exported(module).onnx


def test_layers_keep_the_names_of_the_modules(pictures):
    names = [layer.name for layer in quantized(exported(trained(DenseNet)), pictures).layers]
    assert {"stem", "grow", "fc"} <= set(names)


def test_nothing_in_the_file_tells_where_it_was_made():
    assert b".py" not in exported(trained(alexnet)).onnx


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(768, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)) + torch.rand(x.shape[0], 10)


@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        (Branching(), "torch cannot export it"),
        (Random(), "draws random numbers"),
        (nn.Linear(5, 3), "torch cannot export it"),
        (nn.Conv2d(3, 4, 3), "not (batch, classes)"),
    ],
    ids=["control flow", "randomness", "other input", "no classifier"],
)
def test_what_cannot_be_exported_faithfully_is_refused_in_one_line(module, complaint):
    with pytest.raises(InputError) as error:
        exported(module.eval())
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_shape_torch_cannot_export():
    loaded = Loaded(Origin("net.pt", "", ""), alexnet().eval(), "module")
    with pytest.raises(UsageError, match="input shape") as error:
        export(loaded)
    assert "--input-shape" in (error.value.hint or "")


class ChannelsLast(nn.Module):
    """Its values lie in memory channel by channel before they are pooled, as in a ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.LayerNorm(8)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.fc(self.pool(x).flatten(1))


def test_pooling_of_channels_that_lie_last_in_memory_mixes_no_images():
    module = ChannelsLast().eval()
    model = export(
        Loaded(Origin("model.pt", "0" * 64, "torch"), module, "module"), stated=Stated(shape=SHAPE)
    )
    assert "GlobalAveragePool" in operators(model.onnx)
    assert "Gather" not in operators(model.onnx)


class Several(nn.Module):
    """A classifier that gives its features too, in one container or another."""

    def __init__(self, pack: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.conv, self.fc, self.pack = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 5), pack

    def forward(self, x: Tensor) -> object:
        features = self.conv(x).mean((2, 3))
        return self.pack(features, self.fc(features))


@pytest.mark.parametrize(
    ("pack", "output"),
    [
        (lambda features, logits: (features, logits), "1"),
        (lambda features, logits: [logits, features], "0"),
        (lambda features, logits: {"hidden": features, "logits": logits}, None),
        (lambda features, logits: {"hidden": features, "score": logits}, "score"),
        (lambda _, logits: (logits,), None),
        (lambda _, logits: {"y": logits, "loss": None}, None),
    ],
    ids=["tuple", "list", "logits", "named", "only one", "only tensor"],
)
def test_one_of_several_outputs_holds_the_classes(pack, output):
    torch.manual_seed(0)
    module = Several(pack).eval()
    loaded = Loaded(Origin("model.pt", "0" * 64, "torch"), module, "module")
    model = export(loaded, stated=Stated(shape=SHAPE, output=output))
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        want = module.fc(module.conv(x).mean((2, 3))).numpy()
    got = open_session(model.onnx, optimizations="off").logits(x.numpy())
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert model.classes == 5


@pytest.mark.parametrize("output", [None, "2"])
def test_a_module_with_several_outputs_is_asked_about(output):
    module = Several(lambda features, logits: (features, logits)).eval()
    loaded = Loaded(Origin("model.pt", "0" * 64, "torch"), module, "module")
    with pytest.raises(UsageError, match="gives a tuple with '0', '1'") as error:
        export(loaded, stated=Stated(shape=SHAPE, output=output))
    assert error.value.hint == "say which holds the classes: --output 0"
