"""Networks that one processor's kernels would corrupt memory for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from qdeploy.architectures.resnet import ResNet18
from qdeploy.core.safe_kernels import is_unsafe, safe_kernels

TRAINING = """
import torch
from torch import nn
from qdeploy.core.safe_kernels import safe_kernels
torch.set_num_threads(THREADS)
net = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2)).to(memory_format=torch.channels_last)
x = torch.randn(32, 4, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
for _ in range(60):
    with safe_kernels(net):
        net(x).square().mean().backward()
print("alive")
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_strided_layer_of_few_channels_is_trained_without_harm_as_on_avx2(threads):
    """Without the guard this process dies of a corrupted heap."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "MALLOC_CHECK_": "3"}
    done = subprocess.run(
        [sys.executable, "-c", TRAINING.replace("THREADS", str(threads))],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@pytest.mark.parametrize(
    ("layer", "unsafe"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), True),
        (nn.Conv2d(16, 16, 1, stride=2, groups=4), True),
        (nn.Conv2d(8, 8, 1, stride=2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, stride=2), False),
        (nn.Linear(4, 8), False),
    ],
)
def test_which_layers_are_meant(layer, unsafe):
    assert is_unsafe(layer) is unsafe


def test_torchscript_hides_strides_so_every_narrow_1x1_convolution_is_meant():
    script = torch.jit.script(nn.Sequential(nn.Conv2d(4, 8, 1)))
    assert any(map(is_unsafe, script.modules()))


@pytest.mark.parametrize(("width", "enabled"), [(4, False), (8, True)])
def test_only_networks_that_hold_one_go_without_onednn(width, enabled):
    with safe_kernels(ResNet18(width=width)):
        assert torch._C._get_mkldnn_enabled() is enabled
    assert torch._C._get_mkldnn_enabled()
