"""The manifest of a fleet: which models, what is done with each, where, and within which limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qdeploy.settings.schema import Spec, load_toml

PLACEHOLDERS = (
    "{stem}",
    "{name}",
)  # in options: the model's file name, without and with its suffix
Positive = Annotated[int, Field(gt=0)]


class ModelsSpec(Spec):
    """Models, and what is said of every one of them."""

    path: str | None = Field(
        None, description="A file, a folder of models, or a pattern as models/*.pt."
    )
    uri: str | None = Field(
        None,
        description=(
            "Registered with MLflow: models:/NAME/VERSION, models:/NAME@ALIAS, models:/NAME (its"
            " newest version), or a pattern of names, as models:/*."
        ),
    )
    tracking_uri: str | None = Field(None, description="Of that registry.")
    options: Mapping[str, Any] = Field(
        {}, description="Options of the commands that only these models need, as card or arch."
    )

    @model_validator(mode="after")
    def _of_one_kind(self) -> ModelsSpec:
        if (self.path is None) == (self.uri is None):
            raise ValueError("either path or uri")
        if (self.uri is None) != (self.tracking_uri is None):
            raise ValueError("uri and tracking_uri belong together")
        return self

    @field_validator("uri")
    @classmethod
    def _registered(cls, uri: str | None) -> str | None:
        if uri is not None and not uri.startswith("models:/"):
            raise ValueError("must begin with models:/")
        return uri


class JobSpec(Spec):
    """What is done with every model: one cell for each recipe, policy and device."""

    verb: Literal["sanitize", "gate", "scan", "compare", "redteam"]
    recipes: tuple[str, ...] = Field((), description="Names or TOML files, each in turn.")
    policies: tuple[str, ...] = Field((), description="The same.")
    devices: tuple[str, ...] = Field((), description="The same.")
    models: str = Field("*", description="Only models with such a name, as int8-*.")
    suite: str | None = Field(None, description="Of redteam: whose models are made.")
    options: Mapping[str, Any] = Field(
        {},
        description=(
            "As the command takes them, with _ for -; {stem} and {name} stand for the model's file"
            " name without and with its suffix."
        ),
    )

    @model_validator(mode="after")
    def _suited(self) -> JobSpec:
        if (self.verb == "redteam") != (self.suite is not None):
            raise ValueError("a suite is what redteam needs, and nothing else")
        return self


class LimitsSpec(Spec):
    """What one cell may take before it is ended."""

    minutes: float = Field(60, gt=0)
    memory_gb: float | None = Field(None, gt=0, description="Of its processes together; on Linux.")
    cores: Positive = 1
    retries: int = Field(
        3, ge=0, description="After a cell was killed, its worker was lost or the disk was full."
    )


class LocalSpec(Spec):
    """Processes on this machine."""

    kind: Literal["local"]
    workers: Positive | None = Field(None, description="Cells at once; else as the cores allow.")


class RaySpec(Spec):
    """A Ray cluster: qdeploy[ray]."""

    kind: Literal["ray"]
    address: str | None = Field(None, description="Of a cluster that runs; else one here.")
    workers: Positive | None = Field(None, description="Cells at once; else as the cluster allows.")
    object_store_mb: Positive = Field(100, description="Of a cluster that is started here.")


class SlurmSpec(Spec):
    """What is written into the script of a job array."""

    partition: str | None = None
    gpu_request: str = Field("gpu:1", description="--gres of cells whose device has a GPU.")
    lines: tuple[str, ...] = Field((), description="Before the command, as module load python.")


class KubernetesSpec(Spec):
    """What is written into an indexed Job."""

    image: str = Field(description="A container in which qdeploy is installed.")
    claim: str = Field(description="Volume claim that holds manifest, models and data.")
    mount: str = Field("/fleet", description="Where it is mounted; paths are relative to it.")
    key_secret: str | None = Field(None, description="Secret that holds the fleet's key, as key.")
    gpu_resource: str = "nvidia.com/gpu"


class EmitSpec(Spec):
    """Of schedulers that are handed a script."""

    slurm: SlurmSpec = SlurmSpec()
    k8s: KubernetesSpec | None = None


class FleetSpec(Spec):
    """The whole file."""

    schema_version: Literal[1]
    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=50)
    store: str = Field(
        "store", description="Where what is done is kept: a folder, or any URL that fsspec knows."
    )
    key: str | None = Field(
        None, description="File of 32 bytes that proves what was made here, on every machine."
    )
    models: tuple[ModelsSpec, ...] = ()
    jobs: tuple[JobSpec, ...] = Field(min_length=1)
    limits: LimitsSpec = LimitsSpec()
    executor: LocalSpec | RaySpec = Field(LocalSpec(kind="local"), discriminator="kind")
    emit: EmitSpec = EmitSpec()


def load_manifest(path: Path) -> FleetSpec:
    """The manifest at `path`.

    Raises:
        InputError: it cannot be read, or does not fit the format.
    """
    return load_toml(path, FleetSpec, what="fleet manifest")
