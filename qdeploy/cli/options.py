"""Options that several commands share, in groups; what only one takes stands in its signature."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qdeploy.cli.groups import Group, given, option
from qdeploy.errors import UsageError

Settings = dict[str, Any]  # keywords of a verb


Model = Annotated[
    Path,
    typer.Argument(
        help="ONNX, torch checkpoint, safetensors (or a folder of them), TorchScript or .pt2."
    ),
]
Models = Annotated[
    list[Path], typer.Argument(help="Models, each with its card beside it if it has one.")
]
File = Annotated[Path, typer.Argument(help="ONNX file, float or quantized, whoever made it.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the file or folder goes.")]
OutFile = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Where the file goes; else here, named after the model."),
]
AsJson = Annotated[
    bool,
    option("--json", "Print the report as JSON, and nothing else there.", "Output"),
]
Seed = Annotated[
    int | None,
    option(
        "--seed", "Same seed, same bytes. Else a secret one of this place.", "Quantization",
        at_least=0,
    ),
]  # fmt: skip
Device = Annotated[
    str | None,
    option("--device", "Name or TOML file; by default x86-avx2, for any x86.", "Quantization"),
]
TestImages = Annotated[
    int | None,
    option("--test-images", "Measure on so many, at most; else on all.", "Data", at_least=1),
]
Reports = Annotated[
    list[Path] | None,
    option(
        "--report",
        "Also write the report here: .html, .json, .xml (JUnit), .sarif or .md; repeatable.",
        "Output",
    ),
]
Artifacts = Annotated[Path, option("--artifacts", "Where run directories are kept.", "Output")]
ArchArgs = Annotated[
    list[str] | None,
    option("--arch-args", "Arguments of the factory, as width=16; repeatable.", "Model"),
]
Arch = Annotated[
    str | None,
    option("--arch", "file.py:factory or package.module:factory, for state dicts.", "Model"),
]
DataRoots = Annotated[
    list[Path] | None,
    option("--data-root", "Folder that the card may reach besides its own; repeatable.", "Model"),
]
Test = Annotated[
    Path | None,
    option("--test", "Labelled images: sub-folder per class (folder or zip), or npz.", "Data"),
]
Calibration = Annotated[
    Path | None,
    option("--calibration", "Folder, zip or npz of images; labels are not used.", "Data"),
]
CalibrationImages = Annotated[
    int | None, option("--calibration-images", "How many of them, at most.", "Data", at_least=1)
]
Reference = Annotated[
    Path | None,
    typer.Option("--reference", help="The float model that it was made from, in any format."),
]


def place_of(out: Path | None, model: Path, ending: str) -> Path:
    """Where the file goes: in the working directory, unless it was said."""
    return out if out is not None else Path(model.stem + ending)


InputShape = Annotated[
    str | None, option("--input-shape", "Channels,height,width; else from the card.", "Model")
]


def parse_shape(text: str | None) -> tuple[int, int, int] | None:
    """The sizes in `3,224,224`.

    Raises:
        UsageError: it is not of that form.
    """
    if text is None:
        return None
    try:
        channels, height, width = (int(size) for size in text.split(","))
    except ValueError:
        raise UsageError(f"--input-shape {text!r} is not channels,height,width") from None
    return channels, height, width


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions(Group):
    """What the float model is, where its file and card do not say it."""

    card: Annotated[
        Path | None, option("--card", "Model card; else NAME.toml beside the model.", "Model")
    ] = None
    data_roots: DataRoots = None
    arch: Arch = None
    arch_args: ArchArgs = None
    input_shape: InputShape = None
    layout: Annotated[
        Literal["channels-first", "channels-last"] | None,
        option(
            "--layout",
            "Where the file's input has its channels, if that does not show: channels-first or"
            " channels-last.",
            "Model",
        ),
    ] = None
    output: Annotated[
        str | None, option("--output", "Of several outputs the one with the classes.", "Model")
    ] = None
    run_code_from_model: Annotated[
        bool,
        option(
            "--run-code-from-model",
            "Open pickled modules and .pt2 files, which can run any code on this machine.",
            "Model",
        ),
    ] = False

    def settings(self) -> dict[str, Any]:
        """The same with arguments and shape parsed.

        Raises:
            UsageError: one of them cannot be.
        """
        shape = parse_shape(self.input_shape)
        parsed = {"arch_args": parse_arguments(self.arch_args), "input_shape": shape}
        return {**Group.settings(self), **given(parsed)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions(Group):
    """The images that scales and integers are fitted to."""

    calibration: Calibration = None
    calibration_images: CalibrationImages = None
    synthetic_calibration: Annotated[
        bool,
        option(
            "--synthetic-calibration",
            "Make calibration images from the model itself. Gets no verdict.",
            "Data",
        ),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceOptions(Group):
    """What a file is judged by."""

    test: Test = None
    triggers: Annotated[
        list[str] | None,
        option(
            "--trigger",
            "TOML file, or 'patch target=0 x=27 y=27 width=4 height=4 color=[1,1,1]'; repeatable.",
            "Data",
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgementOptions(Group):
    """By what it is judged, and where that is written down."""

    policy: Annotated[
        str | None,
        option("--policy", "What must be shown: name (see qdeploy policies) or TOML file.", "Gate"),
    ] = None
    reports: Reports = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationOptions(Group):
    """How the integers are chosen."""

    bits: Annotated[
        Literal["4", "8", "auto"] | None,
        option(
            "--bits", "Bits of a weight; auto gives 8 to the layers that need them.", "Quantization"
        ),
    ] = None
    keep_at_8: Annotated[
        list[str] | None,
        option(
            "--keep-at-8", "Pattern of layers that keep 8 bits; may be repeated.", "Quantization"
        ),
    ] = None
    keep_float: Annotated[
        list[str] | None,
        option(
            "--keep-float",
            "Pattern of layers that run in float, on 8-bit weights; may be repeated.",
            "Quantization",
        ),
    ] = None
    recipe: Annotated[
        str | None, option("--recipe", "Name (see qdeploy recipes) or TOML file.", "Quantization")
    ] = None
    optimize: Annotated[
        Literal["size", "latency"] | None,
        option(
            "--optimize",
            "latency leaves layers in float that integers make slower here; else size.",
            "Quantization",
        ),
    ] = None
    device: Device = None
    seed: Seed = None
    rounding: Annotated[
        str | None,
        option(
            "--rounding",
            "Method, as nearest or gptq; efrap unless the recipe says otherwise.",
            "Quantization",
        ),
    ] = None
    solver: Annotated[
        Literal["descent", "adam"] | None,
        option(
            "--solver", "Of efrap, adaround, brecq; adam is the slow published one.", "Quantization"
        ),
    ] = None
    weight_storage: Annotated[
        Literal["int4", "int8"] | None,
        option(
            "--weight-storage", "Type that holds 4-bit weights: smaller or faster.", "Quantization"
        ),
    ] = None
    format: Annotated[
        Literal["onnx", "ort"] | None,
        option("--format", "ort writes and measures ORT format too, for phones.", "Quantization"),
    ] = None
    activation_bits: Annotated[
        Literal["8", "none"] | None,
        option("--activation-bits", "none leaves activations in float.", "Quantization"),
    ] = None

    def settings(self) -> dict[str, Any]:
        """The same with numbers as numbers."""
        numbers = {
            "bits": int(self.bits) if self.bits in {"4", "8"} else self.bits,
            "activation_bits": 8 if self.activation_bits == "8" else self.activation_bits,
        }
        return {**Group.settings(self), **given(numbers)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TeachingOptions(Group):
    """How a student is taught."""

    image_count: Annotated[
        int | None,
        option("--image-count", "How many of them, at most; else all.", "Cleaning", at_least=2),
    ] = None
    schedule: Annotated[
        Literal["short", "paper"] | None,
        option("--schedule", "Ours (short), or as published: up to 300 epochs.", "Cleaning"),
    ] = None
    epochs: Annotated[
        int | None,
        option("--epochs", "At most; else as the schedule says.", "Cleaning", at_least=1),
    ] = None
    watch: Annotated[
        list[str] | None,
        option(
            "--watch",
            "Pattern of layer names that asd shifts; else found by structure; repeatable.",
            "Cleaning",
        ),
    ] = None
    further: Annotated[
        float | None,
        option(
            "--further",
            "How far unlearn goes the way its training went; 1 is the end, else 1.25.",
            "Cleaning",
            at_least=0,
        ),
    ] = None
    accelerator: Annotated[
        Literal["cpu", "cuda"] | None,
        option("--accelerator", "Where the student is trained; else on the CPU.", "Cleaning"),
    ] = None


def parse_arguments(texts: list[str] | None) -> dict[str, Any] | None:
    """`width=16` and `width=16,classes=10` as arguments; values as in TOML, else text.

    Raises:
        UsageError: one is no such pair.
    """
    if not texts:
        return None
    arguments: dict[str, Any] = {}
    for pair in (pair for text in texts for pair in text.split(",")):
        key, separator, value = pair.partition("=")
        if not separator or not key.strip().isidentifier():
            raise UsageError(f"--arch-args {pair!r} is not name=value")
        try:
            arguments[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            arguments[key.strip()] = value.strip()
    return arguments
