"""Device profiles: what a target can run, and how a file must be made for it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qdeploy.machine import exact_8bit_products, processor_flags
from qdeploy.settings.schema import Spec, find_bundled, load_toml

AUTO = "auto"
EMULATED = "avx2-emulated"  # the runtime of pairs of products that saturate
ORT_FORMAT = "ort-format"  # the runtime that runs a file in that format
ANYWHERE = "x86-avx2"  # its files answer alike on every processor; that costs nothing measurable
LARGEST_CODE_WITHOUT_SATURATION = 64  # 2 * 255 * 64 is less than 2^15


class RuntimeSpec(Spec):
    """One way of running the file that the device offers; every one is measured."""

    provider: str = Field(
        description="As `qdeploy.runtime.known` has it: cpu, cuda, openvino, reference, ssh..."
    )
    optimizations: Literal["all", "off"] = "all"
    options: dict[str, str] = Field(
        default={}, description="What the runtime must know beyond, as an address."
    )
    images: int | None = Field(
        None, gt=0,
        description=(
            "Test images that a slow runtime is asked about, at most, drawn by chance: for"
            " agreement with the first runtime alone. Not for the first."
        ),
    )  # fmt: skip

    @property
    def label(self) -> str:
        """What it is called in results: runtimes that differ have different labels."""
        unoptimized = () if self.optimizations == "all" else ("unoptimized",)
        return ", ".join((" ".join((self.provider, *self.options.values())), *unoptimized))


Bits = Literal["4", "8"]
Storage = Literal["int4", "int8"]
AS_INT8: dict[Bits, Storage] = {"4": "int8", "8": "int8"}


class WeightSpec(Spec):
    storage: dict[Bits, Storage] = Field(
        default=AS_INT8,
        description="Type that holds the codes of a grid of so many bits.",
    )
    max_code: Annotated[int, Field(gt=0, le=127)] = Field(
        127,
        description=(
            "Largest magnitude of an 8-bit code; 64 where the processor adds pairs of products in"
            " 16 bits and would saturate."
        ),
    )


class BudgetSpec(Spec):
    """Limits of the device; what is not given is not checked."""

    file_bytes: int | None = Field(None, gt=0)
    latency_ms: float | None = Field(None, gt=0, description="Median at batch 1.")
    latency_ratio: float | None = Field(
        None, gt=0, description="The same over that of the float model, in turn: 1 is as fast."
    )


class DeviceProfile(Spec):
    """What a target can run, how a file is made for it, and what it may cost."""

    schema_version: Literal[1]
    name: str
    description: str
    opset: Literal[21] = 21
    ir_version: Literal[10] = 10
    format: Literal["onnx", "ort"] = Field(
        "onnx",
        description="What the target takes. ort: the file is written in ORT format too, and a"
        " runtime ort-format among the others shows what it answers then.",
    )
    runtimes: tuple[RuntimeSpec, ...] = Field(min_length=1)
    weights: WeightSpec = WeightSpec()
    budget: BudgetSpec = BudgetSpec()

    @field_validator("runtimes")
    @classmethod
    def _distinct(cls, runtimes: tuple[RuntimeSpec, ...]) -> tuple[RuntimeSpec, ...]:
        labels = [runtime.label for runtime in runtimes]
        if len(set(labels)) < len(labels):
            raise ValueError("two runtimes are the same")
        if runtimes[0].images is not None:
            raise ValueError("the first runtime is asked about all images")
        return runtimes

    @model_validator(mode="after")
    def _measures_what_it_takes(self) -> DeviceProfile:
        if self.format == "ort" and not any(r.provider == ORT_FORMAT for r in self.runtimes):
            raise ValueError(f"format = 'ort' goes with a runtime {ORT_FORMAT!r}, which asks it")
        return self

    @property
    def saturates(self) -> bool:
        """Whether its processor adds pairs of 8-bit products in 16 bits."""
        return self.weights.max_code <= LARGEST_CODE_WITHOUT_SATURATION


def load_device(name_or_path: str) -> DeviceProfile:
    """The device profile of that name, or in that file; `AUTO` is the one for any machine.

    Raises:
        UsageError: there is no such profile.
        InputError: the file does not fit the format.
    """
    name = ANYWHERE if name_or_path == AUTO else name_or_path
    return load_toml(find_bundled("devices", name), DeviceProfile, what="device profile")


def misfit(device: DeviceProfile) -> str | None:
    """What of the device's figures this processor cannot give, if anything."""
    on_cpu = any(runtime.provider == "cpu" for runtime in device.runtimes)
    if not on_cpu or device.saturates or exact_8bit_products(processor_flags()):
        return None
    return (
        f"device {device.name}: this processor adds pairs of 8-bit products in 16 bits, where codes"
        f" beyond {LARGEST_CODE_WITHOUT_SATURATION} can saturate; products with constant"
        " weights are computed exactly, as the device does, by slower kernels, so that latencies"
        " are not the device's; a file that is to run on this"
        f" processor needs --device {ANYWHERE}"
    )
