"""A fleet as a script for a scheduler: each of its tasks runs one share of the cells.

A task is a plain `qdeploy fleet MANIFEST --share I/N`: it takes its cells by their ids from the
same manifest, skips those that are done, and keeps what it does in the store. The same command
without `--share`, run after them, writes the report, and does what was left over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path, PurePosixPath
from shlex import join, quote
from typing import Any

from qdeploy.errors import UsageError
from qdeploy.fleet.cells import Cell
from qdeploy.fleet.manifest import FleetSpec
from qdeploy.fleet.rays import needs_gpu

MOST_TASKS = 1000  # Slurm's MaxArraySize, unless its administrator has set another
OWN_GB = 2  # of what runs the cells
ALONE = ("--executor", "local", "--workers", "1")
MARGIN_MINUTES = 10  # for opening the manifest, and for the last cell to end


@dataclass(frozen=True, slots=True)
class Job:
    """What a scheduler is told."""

    spec: FleetSpec
    manifest: Path
    out: Path
    cells: Sequence[Cell]

    @property
    def tasks(self) -> int:
        return max(1, min(len(self.cells), MOST_TASKS))

    @property
    def minutes(self) -> int:
        """That a task may take: each of its cells in turn, at its limit."""
        each = ceil(len(self.cells) / self.tasks)
        return (
            ceil(each * self.spec.limits.minutes * (1 + self.spec.limits.retries)) + MARGIN_MINUTES
        )

    @property
    def megabytes(self) -> int | None:
        """Of memory (2^20 bytes), for a cell and for what runs it; None: nothing was said."""
        limit = self.spec.limits.memory_gb
        return None if limit is None else ceil((limit + OWN_GB) * 1e9 / 2**20)

    @property
    def gpu(self) -> bool:
        return any(map(needs_gpu, self.cells))


def to_slurm(job: Job) -> str:
    """The script of a job array, for `sbatch`.

    Raises:
        UsageError: a path is not of characters that can be printed.
    """
    limits, slurm = job.spec.limits, job.spec.emit.slurm
    for text in (str(job.manifest), str(job.out), slurm.partition or "", slurm.gpu_request):
        if not text.isprintable():
            raise UsageError(f"--emit slurm: {text!r} cannot be written into a script")
    asked = [
        f"--job-name={job.spec.name}",
        f"--array=0-{job.tasks - 1}",
        f"--cpus-per-task={limits.cores}",
        f"--time={job.minutes}",
        *([] if job.megabytes is None else [f"--mem={job.megabytes}M"]),
        *([] if slurm.partition is None else [f"--partition={slurm.partition}"]),
        *([f"--gres={slurm.gpu_request}"] if job.gpu else []),
        "--requeue",
        f"--output={quote(str(job.out / 'slurm-%A-%a.log'))}",
    ]
    whole = join(["qdeploy", "fleet", str(job.manifest), "--out", str(job.out)])
    return "\n".join(
        [
            "#!/bin/sh",
            *(f"#SBATCH {option}" for option in asked),
            f"# {len(job.cells)} cells. After it: {whole}",
            *slurm.lines,
            f"exec {whole} {join(ALONE)} \\",
            f'  --share "$SLURM_ARRAY_TASK_ID/{job.tasks}"',
            "",
        ]
    )


def to_k8s(job: Job) -> str:
    """An indexed Job as JSON, for `kubectl apply -f`.

    Raises:
        UsageError: the manifest does not say in which container.
    """
    k8s, limits = job.spec.emit.k8s, job.spec.limits
    if k8s is None:
        raise UsageError(
            "--emit k8s: the manifest does not say in which container",
            hint='[emit.k8s] with image = "..." and claim = "..."',
        )
    mount = PurePosixPath(k8s.mount)
    resources: dict[str, Any] = {"cpu": str(limits.cores)}
    if job.megabytes is not None:
        resources["memory"] = f"{job.megabytes}Mi"
    if job.gpu:
        resources[k8s.gpu_resource] = "1"
    call = ["fleet", str(mount / job.manifest.name), "--out", str(mount / "out"), *ALONE]
    share = f"$(JOB_COMPLETION_INDEX)/{job.tasks}"
    container: dict[str, Any] = {
        "name": "cells",
        "image": k8s.image,
        "command": ["qdeploy"],
        "args": [*call, "--share", share],
        "resources": {"requests": resources, "limits": resources},
        "volumeMounts": [{"name": "fleet", "mountPath": str(mount)}],
    }
    volumes: list[dict[str, Any]] = [
        {"name": "fleet", "persistentVolumeClaim": {"claimName": k8s.claim}}
    ]
    if k8s.key_secret is not None:
        container["volumeMounts"].append({"name": "key", "mountPath": "/key", "readOnly": True})
        container["env"] = [{"name": "QDEPLOY_KEY", "value": "/key/key"}]
        secret = {"secretName": k8s.key_secret, "defaultMode": 0o440}
        volumes.append({"name": "key", "secret": secret})
    template = {"restartPolicy": "Never", "containers": [container], "volumes": volumes}
    table = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.spec.name},
        "spec": {
            "completions": job.tasks,
            "parallelism": job.tasks
            if job.spec.executor.workers is None
            else job.spec.executor.workers,
            "completionMode": "Indexed",
            "backoffLimitPerIndex": limits.retries,
            # what a cell says is in the store: only a pod that was lost is started again
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [2, 3, 4]}}
                ]
            },
            "template": {"spec": template},
        },
    }
    return json.dumps(table, indent=2) + "\n"


EMITTERS: Mapping[str, Callable[[Job], str]] = {"slurm": to_slurm, "k8s": to_k8s}
