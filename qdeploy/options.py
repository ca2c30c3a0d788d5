"""Every option of the command line, described once; each command names the ones it takes."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import typer

ARTIFACTS = Path("artifacts")
RoundingKind = Literal[
    "efrap", "nearest", "stochastic", "flip", "adaround", "brecq", "pdquant", "flexround", "gptq"
]


def _option(flag: str, help_text: str, panel: str, *, at_least: int | None = None) -> object:
    return typer.Option(flag, help=help_text, rich_help_panel=panel, min=at_least)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user said. What was not said has its default."""

    command: str = ""  # how it was said, for the report

    model: Annotated[
        Path, typer.Argument(help="ONNX, torch checkpoint, safetensors, TorchScript or .pt2.")
    ] = Path()
    file: Annotated[
        Path, typer.Argument(help="ONNX file, float or quantized, whoever made it.")
    ] = Path()
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the file or folder goes.")] = (
        Path()
    )
    reference: Annotated[
        Path | None,
        typer.Option("--reference", help="The float model that it was made from, in any format."),
    ] = None
    made_by: Annotated[
        Path | None,
        typer.Option(
            "--made-by",
            help="report.json of the run that rounded it: its integers are then explained.",
        ),
    ] = None
    policy: Annotated[
        str | None,
        _option(
            "--policy", "What must be shown: name (see qdeploy policies) or TOML file.", "Gate"
        ),
    ] = None

    card: Annotated[
        Path | None, _option("--card", "Model card; else NAME.toml beside the model.", "Model")
    ] = None
    arch: Annotated[
        str | None,
        _option("--arch", "file.py:factory or package.module:factory, for state dicts.", "Model"),
    ] = None
    arch_args: Annotated[
        list[str] | None,
        _option("--arch-args", "Arguments of the factory, as width=16; repeatable.", "Model"),
    ] = None
    input_shape: Annotated[
        str | None, _option("--input-shape", "Channels,height,width; else from the card.", "Model")
    ] = None
    run_code_from_model: Annotated[
        bool,
        _option(
            "--run-code-from-model",
            "Open pickled modules and .pt2 files, which can run any code on this machine.",
            "Model",
        ),
    ] = False

    calibration: Annotated[
        Path | None,
        _option("--calibration", "Folder, zip or npz of images; labels are not used.", "Data"),
    ] = None
    calibration_images: Annotated[
        int | None,
        _option("--calibration-images", "How many of them, at most.", "Data", at_least=1),
    ] = None
    synthetic_calibration: Annotated[
        bool,
        _option(
            "--synthetic-calibration",
            "Make calibration images from the model itself. Gets no verdict.",
            "Data",
        ),
    ] = False
    test: Annotated[
        Path | None,
        _option("--test", "Labelled images: sub-folder per class (folder or zip), or npz.", "Data"),
    ] = None
    trigger: Annotated[
        list[str] | None,
        _option(
            "--trigger",
            "TOML file, or 'patch target=0 x=27 y=27 width=4 height=4 color=[1,1,1]'; repeatable.",
            "Data",
        ),
    ] = None

    bits: Annotated[
        Literal["4", "8"] | None, _option("--bits", "Bits of a weight.", "Quantization")
    ] = None
    recipe: Annotated[
        str | None, _option("--recipe", "Name (see qdeploy recipes) or TOML file.", "Quantization")
    ] = None
    device: Annotated[
        str | None,
        _option(
            "--device", "Name or TOML file; by default this machine's profile.", "Quantization"
        ),
    ] = None
    rounding: Annotated[
        RoundingKind | None,
        _option("--rounding", "Method; efrap unless the recipe says otherwise.", "Quantization"),
    ] = None
    solver: Annotated[
        Literal["descent", "adam"] | None,
        _option(
            "--solver", "Of efrap, adaround, brecq; adam is the slow published one.", "Quantization"
        ),
    ] = None
    weight_storage: Annotated[
        Literal["int4", "int8"] | None,
        _option(
            "--weight-storage", "Type that holds 4-bit weights: smaller or faster.", "Quantization"
        ),
    ] = None
    activation_bits: Annotated[
        Literal["8", "none"] | None,
        _option("--activation-bits", "none leaves activations in float.", "Quantization"),
    ] = None
    seed: Annotated[
        int | None,
        _option(
            "--seed",
            "Same seed, same bytes. Else a secret one of this place.",
            "Quantization",
            at_least=0,
        ),
    ] = None

    data_root: Annotated[
        list[Path] | None,
        _option(
            "--data-root",
            "Folder that the card may reach besides its own; repeatable.",
            "Model",
        ),
    ] = None

    attack: Annotated[
        str, _option("--attack", "Name (see qdeploy redteam attacks) or TOML file.", "Attack")
    ] = ""
    network: Annotated[
        str, _option("--arch", "alexnet, digits, mobilenetv2, resnet18, vgg16 or vit.", "Attack")
    ] = ""
    images: Annotated[
        str,
        _option(
            "--data",
            "digits; or training images: sub-folder per class (folder or zip), or npz.",
            "Attack",
        ),
    ] = ""
    test_images: Annotated[
        int | None,
        _option("--test-images", "Measure on so many, at most; else on all.", "Data", at_least=1),
    ] = None
    suite: Annotated[
        str, typer.Argument(help="Name (see qdeploy redteam suites) or TOML file.")
    ] = ""
    base: Annotated[
        Path | None,
        _option("--base", "Clean model to start from; else one is trained and kept.", "Attack"),
    ] = None

    unlabelled: Annotated[
        Path,
        _option(
            "--images",
            "Folder, zip or npz; labels are not used, and other things may be on them.",
            "Distillation",
        ),
    ] = Path()
    image_count: Annotated[
        int | None,
        _option(
            "--image-count", "How many of them, at most; else all.", "Distillation", at_least=2
        ),
    ] = None
    sanitizer: Annotated[
        Literal["unlearn", "asd", "kd", "bcu"],
        _option(
            "--sanitizer",
            "Seek triggers and unlearn them, shift attention, distil alone, or forget.",
            "Distillation",
        ),
    ] = "unlearn"
    clean_with: Annotated[
        Literal["unlearn", "asd", "kd", "bcu"] | None,
        _option(
            "--sanitizer", "Clean the float model first, as qdeploy distill does.", "Distillation"
        ),
    ] = None
    cleaning_images: Annotated[
        Path | None,
        _option(
            "--images", "Unlabelled, for that; else those for calibration, all.", "Distillation"
        ),
    ] = None
    schedule: Annotated[
        Literal["short", "paper"],
        _option("--schedule", "Ours, or as published: up to 300 epochs.", "Distillation"),
    ] = "short"
    epochs: Annotated[
        int | None,
        _option("--epochs", "At most; else as the schedule says.", "Distillation", at_least=1),
    ] = None
    watch: Annotated[
        list[str] | None,
        _option(
            "--watch",
            "Pattern of layer names that asd shifts; else found by structure; repeatable.",
            "Distillation",
        ),
    ] = None

    further: Annotated[
        float | None,
        _option(
            "--further",
            "How far unlearn goes the way its training went; 1 is the end, else 1.25.",
            "Distillation",
            at_least=0,
        ),
    ] = None
    accelerator: Annotated[
        Literal["cpu", "cuda"],
        _option("--accelerator", "Where the student is trained.", "Distillation"),
    ] = "cpu"

    models: Annotated[
        list[Path] | None,
        typer.Argument(help="Models, each with its card beside it if it has one."),
    ] = None
    methods: Annotated[
        str, _option("--methods", "Names separated by commas, or all.", "Comparison")
    ] = "nearest,stochastic,flip,gptq,adaround-descent,brecq-descent,efrap-descent"
    grids: Annotated[
        str,
        _option(
            "--grids",
            "absmax, half, minmax, mse; per tensor with tensor- before it; or all.",
            "Comparison",
        ),
    ] = "absmax"
    widths: Annotated[str, _option("--bits", "Bits of a weight: 4, 8 or 4,8.", "Comparison")] = "4"
    activation_widths: Annotated[
        str, _option("--activation-bits", "8, none or 8,none.", "Comparison")
    ] = "8"
    seeds: Annotated[
        int,
        _option("--seeds", "How often, with other images and draws.", "Comparison", at_least=1),
    ] = 1
    steps: Annotated[
        int | None,
        _option("--steps", "Of methods that train; else as published.", "Comparison", at_least=1),
    ] = None

    judged_by: Annotated[
        Path, _option("--report", "The report.json of the run that judged it.", "Attestation")
    ] = Path()
    expected_report: Annotated[
        Path | None,
        _option("--report", "A report.json that must be the attested one.", "Attestation"),
    ] = None
    key: Annotated[
        Path,
        _option(
            "--key",
            "Private key (PEM); its password, if any, in QDEPLOY_KEY_PASSWORD.",
            "Attestation",
        ),
    ] = Path()
    days: Annotated[
        int,
        _option("--days", "How long it is to be relied on, from today.", "Attestation", at_least=1),
    ] = 90
    trusted_keys: Annotated[
        list[Path] | None,
        _option("--key", "Public key (PEM) that is trusted; repeatable.", "Attestation"),
    ] = None
    envelope: Annotated[
        Path | None,
        _option("--out", "Where it goes; else FILE.intoto.json beside the file.", "Attestation"),
    ] = None
    attestation: Annotated[
        Path | None,
        _option("--attestation", "The envelope; else FILE.intoto.json.", "Attestation"),
    ] = None

    run: Annotated[Path, typer.Argument(help="Run directory, or the report.json of one.")] = Path()
    tracking_uri: Annotated[
        str, _option("--tracking-uri", "Of the MLflow server, as http://host:5000.", "MLflow")
    ] = ""
    experiment: Annotated[str, _option("--experiment", "Made if it is not there.", "MLflow")] = ""
    registered_model: Annotated[
        str | None,
        _option("--registered-model", "Also tag a version of this model with it.", "MLflow"),
    ] = None
    model_version: Annotated[
        int | None,
        _option(
            "--model-version",
            "This version, if it holds the judged file; else a new one is made.",
            "MLflow",
            at_least=1,
        ),
    ] = None

    report: Annotated[
        list[Path] | None,
        _option(
            "--report",
            "Also write the report here: .html, .json, .xml (JUnit), .sarif or .md; repeatable.",
            "Output",
        ),
    ] = None
    artifacts: Annotated[
        Path, _option("--artifacts", "Where run directories are kept.", "Output")
    ] = ARTIFACTS
    dry_run: Annotated[bool, _option("--dry-run", "Show the plan and stop.", "Output")] = False


REQUIRED = frozenset({
    "model", "models", "file", "out", "attack", "network", "images", "unlabelled", "suite",
    "judged_by", "key", "trusted_keys", "run", "tracking_uri", "experiment",
})  # fmt: skip
MODEL = ("card", "data_root", "arch", "arch_args", "input_shape", "run_code_from_model")
ATTESTATION = ("file", "judged_by", "key", "envelope", "days")
VERIFICATION = ("file", "attestation", "trusted_keys", "expected_report")
TRACKING = ("run", "tracking_uri", "experiment", "registered_model", "model_version")
CALIBRATION = ("calibration", "calibration_images", "synthetic_calibration")
EVIDENCE = ("test", "trigger")
RECIPE = ("bits", "recipe", "device", "seed")
MATRIX = ("methods", "grids", "widths", "activation_widths", "seeds", "steps")
COURSE = ("image_count", "schedule", "epochs", "watch", "further", "accelerator")
DISTILLATION = ("unlabelled", "sanitizer", *COURSE, "seed")
CLEANING = ("clean_with", "cleaning_images", *COURSE)
METHOD = ("rounding", "solver", "weight_storage", "activation_bits")


def takes(*names: str) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Make a typer command of a function of `Options` that takes the options called `names`."""
    hints = get_type_hints(Options, include_extras=True)
    defaults = {f.name: f.default for f in fields(Options)}
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if name in REQUIRED else defaults[name],
            annotation=hints[name],
        )
        for name in names
    ]
    assert all(default is not MISSING for default in defaults.values())  # noqa: S101

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        @wraps(function)
        def command(**values: object) -> None:
            said = shlex.join(["qdeploy", *sys.argv[1:]])
            function(Options(**values, command=said))  # type: ignore[arg-type]

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {name: hints[name] for name in names}
        return command

    return decorate
