"""Calibration images for those who have none: made from the model's own BatchNorm statistics.

Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020. They bring activations
into a plausible range, no more: what was judged with their help never gets past "no verdict".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qdeploy.data import Images, Preprocessing, images_from_array
from qdeploy.progress import SILENT, Progress

COUNT = 64
STEPS = 100
LEARNING_RATE = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Synthetic:
    images: Images
    method: str  # said in the report


def synthesize(
    content: Any, preprocessing: Preprocessing, seed: int, progress: Progress = SILENT
) -> Synthetic:
    """Images on which the model's BatchNorm layers see the statistics they were trained with.

    Args:
        content: The loaded model. Without BatchNorm modules (ONNX, TorchScript, exported programs,
            networks that have none) the images are noise.
    """
    noise = (
        np.random.default_rng(seed).normal(size=(COUNT, *preprocessing.shape)).astype(np.float32)
    )
    norms = _batch_norms(content)
    if norms:
        noise, method = _match_statistics(content, norms, noise, progress), "BatchNorm statistics"
    else:
        method = "noise (no BatchNorm statistics in reach)"
    mean, std = (
        np.array(v, np.float32)[:, None, None] for v in (preprocessing.mean, preprocessing.std)
    )
    pixels = np.rint(np.clip(noise * std + mean, 0, 1) * 255).astype(np.uint8)
    pixels = pixels[:, ::-1] if preprocessing.bgr else pixels
    return Synthetic(images_from_array("synthetic images", pixels, preprocessing), method)


def _batch_norms(content: Any) -> list[Any]:
    """The BatchNorm modules of a torch module that can be hooked."""
    if not hasattr(content, "modules"):
        return []
    from torch import jit, nn

    if isinstance(content, jit.ScriptModule):
        return []
    norms = (m for m in content.modules() if isinstance(m, nn.BatchNorm2d))
    return [m for m in norms if m.running_mean is not None]


def _match_statistics(
    module: Any, norms: list[Any], start: np.ndarray, progress: Progress
) -> np.ndarray:
    import torch

    from qdeploy.core.safe_kernels import safe_kernels

    seen: dict[Any, torch.Tensor] = {}

    def watch(norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        wanted = norm.running_var.clamp_min(norm.eps)
        seen[norm] = ((mean - norm.running_mean).square() / wanted).mean() + (
            (variance.clamp_min(norm.eps) / wanted).log().square()
        ).mean()

    handles = [norm.register_forward_pre_hook(watch) for norm in norms]
    trained = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for parameter, _ in trained:
            parameter.requires_grad_(requires_grad=False)
        x = torch.from_numpy(start).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=LEARNING_RATE)
        for _ in progress.track(range(STEPS), "synthetic images", STEPS):
            seen.clear()
            optimizer.zero_grad()
            with safe_kernels(module):
                module(x)
                loss = torch.stack(list(seen.values())).mean()
                loss.backward()
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
    return x.detach().numpy()
