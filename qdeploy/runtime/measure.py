"""How long files take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import numpy as np

from qdeploy.formats.onnx.codes import products_fit
from qdeploy.runtime.known import Runner, runtime_of
from qdeploy.settings.device import LARGEST_CODE_WITHOUT_SATURATION, DeviceProfile, RuntimeSpec
from qdeploy.values import Latency, Variant

LATENCY_BATCHES = (1, 32)
LATENCY_TURNS, RUNS_OF_A_TURN = 3, 15
LONGEST_TURN_SECONDS = 1.0  # of a large model fewer runs say as much
FEWEST_RUNS = {1: 3, 32: 1}  # of a turn, by batch
LONGEST_BATCH_SECONDS = 2.0  # a batch that takes longer says nothing that one image does not


def may_saturate(device: DeviceProfile, files: Iterable[bytes]) -> bool:
    """Whether files are opened with kernels whose pairs of products can saturate.

    That is as the device computes; or where no product of any of them can, and these are faster.
    """
    return device.saturates or all(
        products_fit(data, LARGEST_CODE_WITHOUT_SATURATION) for data in files
    )


def measure_latency(
    models: Iterable[tuple[Variant, bytes]],
    shape: tuple[int, int, int],
    *,
    runtime: RuntimeSpec,
    runs: int,
    saturating: bool = False,
) -> tuple[Latency, ...]:
    """Median time of each model at batch 1 and 32, the models taking turns.

    One session is open at a time, since idle ones keep the cores busy. Only the ratios mean
    something on a machine that does other work. `saturating` is that of `Runtime.open`.
    """
    seconds: dict[tuple[Variant, int], list[float]] = {}
    contestants = tuple(models)
    for _ in range(LATENCY_TURNS if runs else 0):
        for name, data in contestants:
            session = runtime_of(runtime).open(data, runtime, saturating=saturating)
            for size in LATENCY_BATCHES:
                if size > 1 and size * seconds[contestants[0][0], 1][0] > LONGEST_BATCH_SECONDS:
                    continue
                times = _run_times(session, (size, *shape), runs)
                seconds.setdefault((name, size), []).extend(times)
    return tuple(
        Latency(name, size, median(times), len(times), *_span_of_median(times))
        for (name, size), times in seconds.items()
    )


def milliseconds_by_turn(
    files: Mapping[str, bytes],
    shape: tuple[int, int, int],
    *,
    runtime: RuntimeSpec,
    turns: int,
    saturating: bool = False,
) -> dict[str, list[float]]:
    """Median time of one image by each file, in each of so many turns.

    `saturating` is that of `Runtime.open`.
    """

    def opened(name: str) -> Runner:
        return runtime_of(runtime).open(files[name], runtime, saturating=saturating)

    found: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(turns):
        for name in files:
            times = _run_times(opened(name), (1, *shape), RUNS_OF_A_TURN)
            found[name].append(1e3 * median(times))
    return found


def milliseconds(runner: Runner, shape: tuple[int, int, int], runs: int) -> float | None:
    """Median time of one image; None if no runs are wanted."""
    return 1e3 * median(_run_times(runner, (1, *shape), runs)) if runs else None


def _span_of_median(times: Sequence[float]) -> tuple[float, float]:
    """The order statistics that hold the median with 95 % confidence, whatever the distribution."""
    n = len(times)
    below = max(int(n / 2 - 0.98 * n**0.5), 0)
    ordered = sorted(times)
    return ordered[below], ordered[n - 1 - below]


def _run_times(session: Runner, shape: tuple[int, ...], runs: int) -> list[float]:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    session.logits(x)  # warms up
    fewest = FEWEST_RUNS.get(shape[0], 1)
    times, until = list[float](), time.monotonic() + LONGEST_TURN_SECONDS
    while len(times) < runs and (len(times) < fewest or time.monotonic() < until):
        times.append(session.seconds(x))
    return times
