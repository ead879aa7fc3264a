"""Updates in the backward pass: what they leave in memory. That they change no bit is in ``tests/test_finetune.py``."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import weakref

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from toolkit.training.in_backward import InBackward

# Two steps over 24 MiB of weights, in a process whose heap nothing else has used: growth over AdamW's moments.
TWO_STEPS = """
import psutil, torch
from accelerate import Accelerator
from torch import nn
from toolkit.training.in_backward import InBackward

net = nn.Sequential(*(layer for _ in range(24) for layer in (nn.Linear(512, 512), nn.GELU())))
optimizer = torch.optim.AdamW(net.parameters(), fused=True)
texts = torch.randn(512, 512)
nn.Linear(8, 8)(torch.randn(8, 8)).sum().backward()
InBackward(net.parameters(), optimizer, Accelerator(cpu=True))
before = psutil.Process().memory_info().rss
for _ in range(2):
    net(texts).sum().backward()
moments = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
print((psutil.Process().memory_info().rss - before) / moments)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is told to give back")
def test_no_holes_stay_in_the_heap() -> None:
    done = subprocess.run([sys.executable, "-c", TWO_STEPS], capture_output=True, text=True, check=True)
    # 1.2; 3 and more where nothing is given back.
    assert float(done.stdout) < 1.6


def test_what_is_removed_holds_no_optimizer() -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    inside = InBackward(layer.parameters(), optimizer, Accelerator(cpu=True))
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.weight.grad is None
    gone = weakref.ref(optimizer)
    inside.remove()
    del inside, optimizer
    gc.collect()
    assert gone() is None
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.weight.grad is not None
