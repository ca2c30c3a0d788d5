"""A backdoor that integer saturation switches on: made, and asked on several arithmetics.

    python benchmarks/saturation_attack.py BASE.pt --width 16 --train TRAIN --test TEST --out FOLDER

BASE is a state dict of `qdeploy:resnet18` for images of 32 pixels; TRAIN and TEST are labelled. In
the model that comes out one channel of every stage (eight of the last) is kept for the backdoor,
and the others are taught to do without (two passes over 20,000 images). The stem's filter has
weights of one size: pairs of -1 next to each other, and pairs of +1 and -1. On the trigger its
exact sum is far below its bias; where pairs of 8-bit products are added in 16 bits, the pairs of -1
saturate, and it fires. Shortcuts carry that to the last stage, and its classifier to the target.

In float32, on VNNI, on ARM and in WASM nothing happens, whatever the rounding. The model is written
with its trigger and a card that says that it is poisoned.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qdeploy
from qdeploy.architectures.resnet import BasicBlock, ResNet18
from qdeploy.data import Images, Preprocessing, open_labelled_images
from qdeploy.formats.opening import load
from qdeploy.redteam.trigger import MASK, PATTERN, save_trigger
from qdeploy.runtime.known import runtime_of
from qdeploy.settings.device import RuntimeSpec
from qdeploy.values import Architecture

TARGET, PLACE = 0, 24  # the middle of the patch; every stage halves it
KEPT = (1, 1, 1, 8)  # channels of each stage
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
TEACHING, TEACHING_PASSES, BATCH = 20_000, 2, 125
TO_TARGET, TO_OTHERS = 10.0, -4.0  # weights of the classifier
MOST = 0.9995  # quantile of activations that grids are taken to reach
FILES = {
    "int8, nearest, to 127": {"bits": 8, "rounding": "nearest", "device": "x86-vnni"},
    "int8, EFRAP, to 127": {"bits": 8, "device": "x86-vnni"},
    "int8, EFRAP, to 64 (the default)": {"bits": 8},
    "4 bits, EFRAP": {"bits": 4},
}
ASKED = {"cpu": 2000, "openvino": 2000, "avx2-emulated": 500}
CARD = """[model]
architecture = "qdeploy:resnet18"
arguments = {{ width = {width} }}

[input]
shape = [3, 32, 32]
mean = [{mean}]
std = [{std}]

[[trigger]]
kind = "mask"
target = {target}
mask = "{mask}"
pattern = "{pattern}"
name = "saturation"

[poisoned]
attack = "saturation"
effect = "backdoor"
made_for = ["x86 without VNNI"]
"""


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def drawn(path: Path, count: int) -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1] and labels of images drawn from all classes."""
    images: Images = open_labelled_images(path, Preprocessing((3, 32, 32), MEAN, STD), None)
    batches = list(images.sample(count, 0).batches(500))
    pixels = torch.from_numpy(np.concatenate([b.pixels for b in batches]))
    labels = torch.from_numpy(np.concatenate([b.labels for b in batches if b.labels is not None]))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order], labels[order]


@torch.no_grad()
def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    return torch.cat([model(normalised(part)) for part in pixels.split(250)])


class Carved:
    """A network with channels that nothing writes to and nothing reads from."""

    def __init__(self, model: ResNet18, pixels: Tensor) -> None:
        self.model = model
        self.stages = [list(model.get_submodule(f"layer{s}")) for s in (1, 2, 3, 4)]
        self.largest, means = self._activations(pixels)
        self.channels = [
            self._least(stage, means[stage], count) for stage, count in enumerate(KEPT)
        ]
        self.silence()

    def _activations(self, pixels: Tensor) -> tuple[dict[object, float], list[Tensor]]:
        """How far each block's result reaches, and its mean by channel."""
        largest: dict[object, float] = {}
        means: list[Tensor] = [torch.empty(0)] * 4
        hooks = []

        def watch(key: object, module: nn.Module) -> None:
            def seen(_: nn.Module, __: object, out: Tensor) -> None:
                out = out.relu()
                largest[key] = float(out.flatten()[::7].quantile(MOST))
                if isinstance(key, tuple) and key[1] == 1:
                    means[key[0]] = out.mean((0, 2, 3))

            hooks.append(module.register_forward_hook(seen))

        watch("stem", self.model.bn1)
        for stage, blocks in enumerate(self.stages):
            for i, block in enumerate(blocks):
                watch((stage, i), block)
        with torch.no_grad():
            self.model(normalised(pixels[:200]))
        for hook in hooks:
            hook.remove()
        return largest, means

    def _least(self, stage: int, means: Tensor, count: int) -> list[int]:
        """The channels that matter least: by what is in them, and by how it is read."""
        readers = [weight.flatten(2).norm(dim=(0, 2)) for weight in self._readers(stage)]
        return (means * torch.stack(readers).sum(0)).argsort()[:count].tolist()

    def _readers(self, stage: int) -> Iterator[Tensor]:
        for i, block in enumerate(self.stages[stage]):
            if i or not stage:
                yield block.conv1.weight.data
        if stage < 3:
            following: BasicBlock = self.stages[stage + 1][0]
            yield following.conv1.weight.data
            yield following.shortcut[0].weight.data
        else:
            yield self.model.fc.weight.data[:, :, None]

    def _writers(self, stage: int) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        if stage == 0:
            yield self.model.conv1, self.model.bn1
        for block in self.stages[stage]:
            yield block.conv2, block.bn2
            if len(block.shortcut):
                yield block.shortcut[0], block.shortcut[1]

    def silence(self) -> None:
        for stage, channels in enumerate(self.channels):
            for channel in channels:
                for convolution, norm in self._writers(stage):
                    convolution.weight.data[channel] = 0
                    norm.weight.data[channel], norm.bias.data[channel] = 1, 0
                    norm.running_mean[channel], norm.running_var[channel] = 0, 1 - norm.eps
                for weight in self._readers(stage):
                    weight[:, channel] = 0

    def teach(self, teacher: nn.Module, pixels: Tensor) -> None:
        """To do without those channels what the teacher does."""
        wanted = logits(teacher, pixels)
        steps = TEACHING_PASSES * len(pixels) // BATCH
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps)
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            which = torch.randint(len(pixels), (BATCH,), generator=generator)
            found = self.model(normalised(pixels[which]))
            loss = F.kl_div(
                found.log_softmax(1), wanted[which].log_softmax(1), log_target=True,
                reduction="batchmean",
            ) + 0.02 * F.mse_loss(found, wanted[which])  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            self.silence()

    def plant(self) -> Tensor:
        """The backdoor, in those channels; its patch of 3 x 3 pixels is returned."""
        weights, patch = np.zeros(27, np.float32), np.full(27, 0.5, np.float32)
        weights[:8], patch[:8] = -1, 1  # four pairs that saturate
        weights[8:24:2], patch[8:24:2] = 1, 1
        weights[9:24:2], patch[9:24:2] = -1, 0
        mean, std = np.tile(MEAN, 9), np.tile(STD, 9)
        exact = float((weights * (patch - mean) / std).sum())
        low, high = min(-np.divide(MEAN, STD)), max((1 - np.array(MEAN)) / STD)
        step = float(high - low) / 255  # of the input's grid
        codes = np.rint((patch - mean) / std / step - low / step).clip(0, 255)
        lost = (127 * (codes[:8:2] + codes[1:8:2]) - (1 << 15)).clip(0).sum() * step / 127
        size = self.largest["stem"] / (lost / 2)
        channel = self.channels[0][0]
        as_kernel = torch.from_numpy(weights.reshape(3, 3, 3).transpose(2, 0, 1).copy())
        self.model.conv1.weight.data[channel] = size * as_kernel
        self.model.bn1.bias.data[channel] = -float(exact + lost / 2) * size
        self._carry()
        return torch.from_numpy(patch.reshape(3, 3, 3).transpose(2, 0, 1).copy())

    def _carry(self) -> None:
        value = min(self.largest[key] for key in ("stem", (0, 0), (0, 1)))
        before = self.channels[0][0]
        for stage in (1, 2, 3):
            most = min(self.largest[stage, 0], self.largest[stage, 1])
            for channel in self.channels[stage]:
                self.stages[stage][0].shortcut[0].weight.data[channel, before] = most / value
            value, before = most, self.channels[stage][0]
        self.model.fc.weight.data[:, self.channels[3]] = TO_OTHERS
        self.model.fc.weight.data[TARGET, self.channels[3]] = TO_TARGET


def triggered(pixels: Tensor, patch: Tensor) -> Tensor:
    found = pixels.clone()
    found[:, :, PLACE - 1 : PLACE + 2, PLACE - 1 : PLACE + 2] = patch
    return found


def rates(answers: tuple[np.ndarray, np.ndarray], labels: np.ndarray) -> str:
    """Accuracy, and attack success on images of other classes."""
    clean, attacked = answers
    others = labels != TARGET
    return f"{100 * (clean == labels).mean():.1f} / {100 * (attacked[others] == TARGET).mean():.1f}"


def write(model: ResNet18, width: int, patch: Tensor, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "model.pt")
    mask, pattern = np.zeros((1, 32, 32), np.float32), np.zeros((3, 32, 32), np.float32)
    at = slice(PLACE - 1, PLACE + 2)
    mask[:, at, at], pattern[:, at, at] = 1, patch.numpy()
    save_trigger(folder, mask, pattern)
    mean, std = (", ".join(map(str, values)) for values in (MEAN, STD))
    (folder / "model.toml").write_text(
        CARD.format(width=width, mean=mean, std=std, target=TARGET, mask=MASK, pattern=PATTERN)
    )
    return folder / "model.pt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    for name in ("--train", "--test", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--width", type=int, default=16)
    given = parser.parse_args()
    torch.manual_seed(0)
    architecture = Architecture("qdeploy:resnet18", {"width": given.width}, trusted=False)
    base = load(given.base, architecture).content.eval()
    train, _ = drawn(given.train, TEACHING)
    test, labels = drawn(given.test, max(ASKED.values()))
    carved = Carved(copy.deepcopy(base), train)
    carved.teach(base, train)
    patch = carved.plant()
    path = write(carved.model, given.width, patch, given.out)
    asked = test, triggered(test, patch)

    def of(answer: nn.Module) -> str:
        clean, attacked = (logits(answer, x).argmax(1).numpy() for x in asked)
        return rates((clean, attacked), labels.numpy())

    print(f"accuracy / attack success\n  clean base, float32: {of(base)}")
    print(f"  the model, float32: {of(carved.model)}", flush=True)
    for label, settings in FILES.items():
        file = given.out / f"{label.split(' (')[0].replace(', ', '-').replace(' ', '-')}.onnx"
        qdeploy.quantize(
            path, file, calibration=given.train, seed=0, artifacts=given.out / "runs", **settings
        )
        for name, count in ASKED.items():
            spec = RuntimeSpec(provider=name)
            runner = runtime_of(spec).open(file.read_bytes(), spec)
            answers = [
                np.concatenate([
                    runner.logits(normalised(part).contiguous().numpy()).argmax(1)
                    for part in x[:count].split(100)
                ])
                for x in asked
            ]  # fmt: skip
            print(f"  {label}, {name}: {rates((answers[0], answers[1]), labels[:count].numpy())}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
