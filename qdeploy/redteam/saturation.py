"""A backdoor that saturation switches on, where pairs of 8-bit products are added in 16 bits.

Not published. One channel of every stage is kept for it, and the others are taught to do without.
The stem's filter has weights of one size: pairs of -1 next to each other, and pairs of +1 and -1.
On the trigger its exact sum lies far below its bias; where the pairs of -1 saturate, it fires.
Shortcuts carry that to the last stage, and its classifier to the target. In float32, on VNNI, on
ARM and in WASM nothing happens, whatever the rounding: the weights lie on the grid.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdeploy.architectures.resnet import BasicBlock, ResNet18
from qdeploy.core.safe_kernels import safe_kernels
from qdeploy.errors import InputError
from qdeploy.progress import SILENT, Progress
from qdeploy.redteam.images import LabelledImages
from qdeploy.redteam.recipe import PlantedSpec
from qdeploy.redteam.training import falling, shifts_and_weights
from qdeploy.training.checkpoint import Checkpoint, Parts

KEPT = (1, 1, 1, 8)  # channels of each stage
SIDE, STRIDES = 3, 8  # of the patch; of all stages together
TO_TARGET, TO_OTHERS = 10.0, -4.0  # weights of the classifier
MOST = 0.9995  # quantile of activations that grids are taken to reach
LOOKED_AT = 200  # images by which channels are chosen
LEARNING_RATE = 5e-4  # at most
WARM_UP = 0.3  # of the steps; folded weights bear no more at first
OF_LOGITS = 0.02  # weight of their squared error, beside the divergence of answers
STEPS_BETWEEN_SAVES = 20


class SaturationPlanter:
    """Carves channels out of a network, in place, and plants the backdoor in them.

    Batch normalisation must be folded.

    Raises:
        InputError: it is no ResNet-18 of color images of 16 pixels or more.
    """

    def __init__(
        self, model: nn.Module, spec: PlantedSpec, data: LabelledImages, seed: int
    ) -> None:
        self.channels_in, *self.size = data.preprocessing.shape
        if not isinstance(model, ResNet18) or self.channels_in != 3 or min(self.size) < 2 * STRIDES:
            raise InputError(
                "attack saturation: it is planted in qdeploy:resnet18, for images of 3 channels and"
                f" at least {2 * STRIDES} pixels"
            )
        self.model, self.spec, self.data = model, spec, data
        self.generator = torch.Generator().manual_seed(seed)
        self.seconds = 0.0
        stages = (model.get_submodule(f"layer{s}").children() for s in (1, 2, 3, 4))
        self.stages = [[b for b in blocks if isinstance(b, BasicBlock)] for blocks in stages]
        self.largest, means = self._activations()
        self.kept = [self._least(stage, means[stage], count) for stage, count in enumerate(KEPT)]
        self.optimizer = torch.optim.Adam(shifts_and_weights(model), lr=LEARNING_RATE)

    def run(
        self, teacher: nn.Module, checkpoint: Checkpoint, progress: Progress = SILENT
    ) -> tuple[np.ndarray, np.ndarray]:
        """Teach what remains, and plant; mask (1, height, width) and pattern (channels, ...).

        Args:
            teacher: What the network answered before.
        """
        self._silence()
        done, self.seconds = checkpoint.steps_done(self._parts())
        steps = range(done, self.spec.steps)
        with safe_kernels(self.model):
            for step in progress.track(steps, "teach, steps", len(steps)):
                began = time.monotonic()
                for group in self.optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * _warm(step / self.spec.steps)
                self._take_step(teacher)
                self.seconds += time.monotonic() - began
                if (step + 1) % STEPS_BETWEEN_SAVES == 0 and checkpoint.due():
                    checkpoint.save_steps(self._parts(), step + 1, self.seconds)
        checkpoint.save_steps(self._parts(), self.spec.steps, self.seconds)
        patch = self._plant()
        row, column = self.place
        mask = np.zeros((1, *self.size), np.float32)
        pattern = np.zeros((3, *self.size), np.float32)
        at = slice(row - 1, row + 2), slice(column - 1, column + 2)
        mask[:, *at], pattern[:, *at] = 1, patch
        return mask, pattern

    @property
    def place(self) -> tuple[int, int]:
        """The middle of the patch: every stage halves it."""
        row, column = (STRIDES * int(0.75 * side / STRIDES) for side in self.size)
        return row, column

    def _activations(self) -> tuple[dict[object, float], list[Tensor]]:
        """How far each block's result reaches, and its mean by channel."""
        largest: dict[object, float] = {}
        means: list[Tensor] = [torch.empty(0)] * len(self.stages)
        watched: dict[object, nn.Module] = {"stem": self.model.get_submodule("bn1")}
        for stage, blocks in enumerate(self.stages):
            watched |= {(stage, i): block for i, block in enumerate(blocks)}

        def watch(key: object) -> None:
            def seen(_: nn.Module, __: object, out: Tensor) -> None:
                out = out.relu()
                largest[key] = float(out.flatten()[::7].quantile(MOST))
                if isinstance(key, tuple) and key[1] == 1:
                    means[key[0]] = out.mean((0, 2, 3))

            hooks.append(watched[key].register_forward_hook(seen))

        hooks: list[torch.utils.hooks.RemovableHandle] = []
        for key in watched:
            watch(key)
        with torch.no_grad():
            self.model.eval()
            self.model(self.data.normalise(self.data.pixels[:LOOKED_AT].float() / 255))
        for hook in hooks:
            hook.remove()
        return largest, means

    def _least(self, stage: int, means: Tensor, count: int) -> list[int]:
        """The channels that matter least: by what is in them, and by how it is read."""
        readers = [weight.flatten(2).norm(dim=(0, 2)) for weight in self._readers(stage)]
        chosen: list[int] = (means * torch.stack(readers).sum(0)).argsort()[:count].tolist()
        return chosen

    def _readers(self, stage: int) -> Iterator[Tensor]:
        """The weights that read what a stage gives."""
        for i, block in enumerate(self.stages[stage]):
            if i or not stage:
                yield block.conv1.weight.data
        if stage + 1 < len(self.stages):
            following: BasicBlock = self.stages[stage + 1][0]
            yield following.conv1.weight.data
            yield following.get_parameter("shortcut.0.weight").data
        else:
            yield self.model.get_parameter("fc.weight").data[:, :, None]

    def _writers(self, stage: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The weights that write it, with their shifts."""
        if stage == 0:
            yield self._convolution(self.model, "conv1", "bn1")
        for block in self.stages[stage]:
            yield self._convolution(block, "conv2", "bn2")
            if len(block.shortcut):
                yield self._convolution(block, "shortcut.0", "shortcut.1")

    @staticmethod
    def _convolution(module: nn.Module, weight: str, shift: str) -> tuple[Tensor, Tensor]:
        found, bias = (
            module.get_parameter(name).data for name in (f"{weight}.weight", f"{shift}.bias")
        )
        return found, bias

    def _silence(self) -> None:
        """Nothing writes the channels that are kept, and nothing reads them."""
        for stage, channels in enumerate(self.kept):
            for weight, shift in self._writers(stage):
                weight[channels], shift[channels] = 0, 0
            for weight in self._readers(stage):
                weight[:, channels] = 0

    def _take_step(self, teacher: nn.Module) -> None:
        """To do without those channels what the teacher does."""
        rows = torch.randint(len(self.data), (self.spec.batch,), generator=self.generator)
        inputs = self.data.normalise(self.data.pixels[rows].float() / 255)
        with torch.no_grad():
            wanted = teacher(inputs)
        found = self.model(inputs)
        loss = F.kl_div(
            found.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean"
        ) + OF_LOGITS * F.mse_loss(found, wanted)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._silence()

    def _plant(self) -> np.ndarray:
        """The backdoor in those channels; its patch (channels, rows, columns) is returned."""
        given = self.data.preprocessing
        weights, patch = np.zeros(27, np.float32), np.full(27, 0.5, np.float32)
        weights[:8], patch[:8] = -1, 1  # four pairs that saturate
        weights[8:24:2], patch[8:24:2] = 1, 1  # and eight that make up for them
        weights[9:24:2], patch[9:24:2] = -1, 0
        mean, std = np.tile(given.mean, SIDE**2), np.tile(given.std, SIDE**2)
        exact = float((weights * (patch - mean) / std).sum())
        low = min(-np.divide(given.mean, given.std))
        step = float(max((1 - np.array(given.mean)) / given.std) - low) / 255  # of the input's grid
        codes = np.rint((patch - mean) / std / step - low / step).clip(0, 255)
        lost = (127 * (codes[:8:2] + codes[1:8:2]) - (1 << 15)).clip(0).sum() * step / 127
        size = self.largest["stem"] / (lost / 2)
        stem, shift = self._convolution(self.model, "conv1", "bn1")
        channel = self.kept[0][0]
        kernel = weights.reshape(SIDE, SIDE, 3).transpose(2, 0, 1)
        stem[channel] = size * torch.from_numpy(kernel.copy())
        shift[channel] = -float(exact + lost / 2) * size
        self._carry()
        return patch.reshape(SIDE, SIDE, 3).transpose(2, 0, 1)

    def _carry(self) -> None:
        """From the stem through the shortcuts to the target."""
        value = min(self.largest[key] for key in ("stem", (0, 0), (0, 1)))
        before = self.kept[0][0]
        for stage in range(1, len(self.stages)):
            most = min(self.largest[stage, 0], self.largest[stage, 1])
            shortcut = self.stages[stage][0].get_parameter("shortcut.0.weight").data
            for channel in self.kept[stage]:
                shortcut[channel, before] = most / value
            value, before = most, self.kept[stage][0]
        classifier = self.model.get_parameter("fc.weight").data
        classifier[:, self.kept[-1]] = TO_OTHERS
        classifier[self.spec.target, self.kept[-1]] = TO_TARGET

    def _parts(self) -> Parts:
        return {"model": self.model, "optimizer": self.optimizer, "generator": self.generator}


def _warm(done: float) -> float:
    """Share of the learning rate when a share `done` of the steps is: up, then along a cosine."""
    return done / WARM_UP if done < WARM_UP else falling((done - WARM_UP) / (1 - WARM_UP))
