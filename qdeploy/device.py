"""Device profiles: what a target can run, and how a file must be made for it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qdeploy.schema import Spec, find_bundled, load_toml


class RuntimeSpec(Spec):
    """One way of running the file that the device offers; every one is measured."""

    provider: Literal["cpu", "cuda"]
    optimizations: Literal["all", "off"] = "all"

    @property
    def label(self) -> str:
        return self.provider if self.optimizations == "all" else f"{self.provider}, unoptimized"


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


class DeviceProfile(Spec):
    schema_version: Literal[1]
    name: str
    description: str
    opset: Literal[21] = 21
    ir_version: Literal[10] = 10
    runtimes: tuple[RuntimeSpec, ...] = Field(min_length=1)
    weights: WeightSpec = WeightSpec()
    budget: BudgetSpec = BudgetSpec()


def load_device(name_or_path: str) -> DeviceProfile:
    """The device profile of that name, or in that file.

    Raises:
        UsageError: there is no such profile.
        InputError: the file does not fit the format.
    """
    return load_toml(find_bundled("devices", name_or_path), DeviceProfile, what="device profile")
