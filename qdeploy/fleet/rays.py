"""Cells on a Ray cluster: each a task that runs its command in a process of its own."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from functools import cache
from importlib import import_module
from logging import ERROR
from pathlib import Path
from threading import Event
from typing import Any

from qdeploy.errors import UsageError, foreign_reader
from qdeploy.fleet.cells import Cell
from qdeploy.fleet.document import Record
from qdeploy.fleet.forks import Forks
from qdeploy.fleet.manifest import LimitsSpec, RaySpec
from qdeploy.fleet.seen import CellOutcome, Seen
from qdeploy.fleet.work import Ended, Task, record_of, work
from qdeploy.machine import cores
from qdeploy.settings.device import load_device

GPU_PROVIDERS = frozenset({"cuda", "tensorrt"})
HINT = "pip install 'qdeploy[ray]'"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class Rays:
    """Ray places the tasks; a worker or a node that is lost is one failed attempt."""

    def __init__(self, ray: Any, slots: int, cores_each: int, owned: bool) -> None:
        self.slots = slots
        self._ray, self._owned = ray, owned
        self._work = ray.remote(num_cpus=cores_each, max_retries=0)(_remote)
        self._under_way: dict[Any, Task] = {}

    def start(self, task: Task) -> None:
        asked: dict[str, float] = {"num_gpus": 1 if needs_gpu(task.cell) else 0}
        if task.limits.memory_bytes is not None:
            asked["memory"] = task.limits.memory_bytes
        self._under_way[self._work.options(**asked).remote(task)] = task

    def ended(self, seconds: float) -> list[Ended]:
        if not self._under_way:
            return []
        done, _ = self._ray.wait(list(self._under_way), timeout=seconds)
        return [self._result(one, self._under_way.pop(one)) for one in done]

    def close(self) -> None:
        for one in self._under_way:
            self._ray.cancel(one, force=True)
        if self._owned:
            self._ray.shutdown()

    def _result(self, one: Any, task: Task) -> Ended:
        try:
            ended: Ended = self._ray.get(one)
        except self._ray.exceptions.RayTaskError:  # a bug of ours
            raise
        except self._ray.exceptions.RayError as error:
            return Ended(task.cell.id, _lost(task, error), again=True)
        return ended


def _remote(task: Task) -> Ended:
    """On a node: what is under way lies in a folder of its own."""
    if not task.work.parent.is_dir():  # of another machine
        task = replace(task, work=_own_folder())
    return work(task, _forks(task.limits.cores), Event())


@cache
def _forks(cores: int) -> Forks:
    """Of this worker of Ray, which takes one task after another and runs none itself."""
    return Forks(cores)


def _own_folder() -> Path:
    """A folder of this user on this node, the same for every attempt."""
    place = Path(tempfile.gettempdir()) / f"qdeploy-fleet-{os.geteuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    found = place.lstat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise UsageError(f"{place} is not of this user alone", hint="remove it")
    return place


def _lost(task: Task, error: Exception) -> Record:
    said = Seen(CellOutcome.FAILED, f"its worker was lost: {type(error).__name__}")
    return record_of(task.cell, said, task.attempt)


def needs_gpu(cell: Cell) -> bool:
    """One of the runtimes of the cell's device computes on a GPU."""
    if cell.asked.device is None:
        return False
    return any(one.provider in GPU_PROVIDERS for one in load_device(cell.asked.device).runtimes)


def open_ray(spec: RaySpec, limits: LimitsSpec) -> Rays:
    """A cluster that runs, or one on this machine.

    Raises:
        UsageError: Ray is not installed, or the cluster has no room for a cell.
        InputError: the cluster is not reached.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise UsageError("executor ray: Ray is not installed", hint=HINT) from error
    owned = not ray.is_initialized()
    if owned:
        with foreign_reader(f"Ray at {spec.address or 'this machine'}"):
            if spec.address is not None:
                ray.init(address=spec.address, log_to_driver=False, logging_level=ERROR)
            else:
                ray.init(
                    num_cpus=cores(), include_dashboard=False, log_to_driver=False,
                    logging_level=ERROR, object_store_memory=spec.object_store_mb << 20,
                )  # fmt: skip
    room = int(ray.cluster_resources().get("CPU", 0)) // limits.cores
    if room < 1:
        raise UsageError(
            f"a cell takes {limits.cores} cores, and the Ray cluster has no room for it"
        )
    return Rays(ray, min(room, spec.workers or room), limits.cores, owned)
