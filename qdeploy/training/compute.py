"""Where a training computes: on which device, and in how many processes that share its batches.

`torchrun` and `accelerate launch` start the processes and tell each its place in the environment
(RANK, LOCAL_RANK, WORLD_SIZE); started alone, a process is the only one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Int64
from torch import Tensor, nn

from qdeploy.errors import ProviderError, UsageError
from qdeploy.training.precision import fast_type

T = TypeVar("T")

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True, slots=True)
class Compute:
    """The device of this process, and its place among those that train together."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that tells, keeps and writes."""
        return self.rank == 0

    def facts(self, *, mixed: bool) -> dict[str, Any]:
        """What changes the result, for a log.

        Args:
            mixed: Whether products may be in another type than the model's: not in TorchScript.
        """
        kind = self.device.type
        found = (fast_type(kind) if mixed else None) or torch.float32
        precision = str(found).removeprefix("torch.")
        return {"device": kind, "precision": precision, "processes": self.world}

    def generator(self, seed: int) -> torch.Generator:
        """Of this process alone; the same for the same seed."""
        return torch.Generator().manual_seed(seed + 1_000_003 * self.rank)

    def mine(self, rows: Int64[Tensor, " n"]) -> Int64[Tensor, " part"]:
        """This process' part of a batch."""
        return rows.tensor_split(self.world)[self.rank]

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put in place of each its mean over the processes."""
        if self.world == 1 or not tensors:
            return
        together = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
        dist.all_reduce(together)
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, part in zip(tensors, (together / self.world).split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))

    def least(self, values: Tensor) -> Tensor:
        """The least of all processes, element by element."""
        if self.world > 1:
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values

    def spread(self, model: nn.Module) -> None:
        """Give every process the weights and statistics that the main one has."""
        if self.world > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    def same(self, value: T) -> T:
        """What the main process has."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """What every process has, by rank."""
        if self.world == 1:
            return [value]
        boxes: list[Any] = [None] * self.world
        dist.all_gather_object(boxes, value)
        return boxes


ALONE = Compute(torch.device("cpu"))


@contextmanager
def computing(accelerator: str) -> Iterator[Compute]:
    """The device called `accelerator`, shared with the processes started together with this one.

    Raises:
        ProviderError: this torch cannot use such a device, or there are fewer than processes.
        UsageError: the environment describes no place among processes.
    """
    rank, local, world = _place()
    device = torch.device("cpu")
    if accelerator == "cuda":
        _require_cuda(local)
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world == 1:
        yield Compute(device)
        return
    # Imported later, as by an optimizer's first step, it would hold the group in its default
    # arguments: destroyed by nobody, the group's threads abort the process at its exit.
    import_module("torch.distributed.nn.functional")
    dist.init_process_group(BACKENDS[accelerator], rank=rank, world_size=world)
    try:
        yield Compute(device, rank, world)
    finally:
        dist.destroy_process_group()


def _place() -> tuple[int, int, int]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    said = [os.environ.get(name, default) for name, default in zip(names, "001", strict=True)]
    try:
        rank, local, world = map(int, said)
    except ValueError:
        rank = local = world = -1
    if not 0 <= rank < world or local < 0:
        found = ", ".join(f"{name}={value}" for name, value in zip(names, said, strict=True))
        raise UsageError(
            f"environment: {found} is no place among processes",
            hint="start with torchrun, or unset them",
        )
    return rank, local, world


def _require_cuda(local: int) -> None:
    if not torch.cuda.is_available():
        raise ProviderError(
            f"--accelerator cuda: torch {torch.__version__} finds no CUDA device",
            hint="install a build of torch for CUDA and its driver, or use --accelerator cpu",
        )
    have = torch.cuda.device_count()
    if local >= have:
        raise ProviderError(
            f"--accelerator cuda: process {local} of this machine has no device, there are {have}",
            hint=f"start {have} processes, or fewer",
        )
