# SPDX-License-Identifier: Apache-2.0
"""What `hal run` costs: a training step against its twin that was ported by hand, and the start of a program.

python benchmarks/launch.py [--rounds N]

Both programs are one text, run with "cuda" while a CPU is adopted and with "cpu" by itself, in turn in one process. The
model and the data are those of nanoGPT's README for a CPU: 4 layers of 4 heads and 128 channels, 12 sequences of 64.
Every sample makes its model anew, in memory that is taken at random before: where a model lies makes a difference of
several percent, which would look like one of the program, and stays what it is as long as the process lives. A second
twin shows what the measurement itself is worth.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Group, Subject, command, main

import hal

STEPS = 4
"""Steps of one sample: less than it takes the machine to change its speed."""

PROGRAM = """
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)
torch.cuda.manual_seed_all(0)
text = np.random.default_rng(0).integers(65, size=10_000).astype(np.uint16)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (part.view(b, t, 4, d // 4).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(65, 128), nn.Embedding(64, 128)
        self.blocks, self.norm = nn.Sequential(*(Block(128) for _ in range(4))), nn.LayerNorm(128)
        self.head = nn.Linear(128, 65, bias=False)
        self.tokens.weight = self.head.weight

    def forward(self, tokens, targets):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        logits = self.head(self.norm(self.blocks(self.tokens(tokens) + self.places(places))))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


model = Model().to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)


def batch():
    starts = torch.randint(len(text) - 64, (12,))
    x = torch.stack([torch.from_numpy(text[i : i + 64].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(text[i + 1 : i + 65].astype(np.int64)) for i in starts])
    if device == "cuda":
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)


def step():
    x, y = batch()
    with torch.autocast(device_type=device, dtype=torch.bfloat16):
        loss = model(x, y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()
"""


def scattered() -> list[torch.Tensor]:
    """Return memory, half of what was taken in pieces of up to 0.8 MB: so the next pieces lie elsewhere each time."""
    pieces = [torch.empty(random.randrange(1, 200_000)) for _ in range(60)]
    random.shuffle(pieces)
    return pieces[:30]


def milliseconds(device: str, fused: bool) -> float:
    """Return what a step takes of a program of its own, as its `__main__` would have it: the mean of `STEPS`."""
    elsewhere = scattered()  # noqa: F841  held until the end
    names = {"__name__": "program", "device": device, "fused": fused}
    exec(compile(PROGRAM, "program.py", "exec"), names)
    step: Callable[[], object] = names["step"]  # type: ignore[assignment]
    for _ in range(2):
        step()
    gc.collect()  # an adoption, which a program makes once, leaves work for the collector
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - start) / STEPS * 1e3


def redirected(fused: bool) -> Callable[[], float]:
    """Return the measurement of the program for CUDA, while a CPU is adopted."""

    def run() -> float:
        with hal.adopt("cpu"):
            return milliseconds("cuda", fused)

    return run


def ported(fused: bool) -> Callable[[], float]:
    """Return the measurement of the program that was ported by hand."""
    return lambda: milliseconds("cpu", fused)


if __name__ == "__main__":
    steps = []
    for fused in (False, True):
        kind = "fused AdamW" if fused else "AdamW"
        twin = f"{kind}: ported by hand"
        steps += [
            Subject(twin, ported(fused)),
            Subject(f"{kind}: a second twin", ported(fused), twin, "1: what the measurement is worth"),
            Subject(f"{kind}: redirected", redirected(fused), twin, "at most 1.02"),
        ]
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # as installed: compiled once
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "imports.py"
        script.write_text("import torch\n")
        python, hal_command = sys.executable, str(Path(sys.executable).parent / "hal")
        start = [
            Subject("python, import torch", command(python, str(script))),
            Subject("hal run, import torch", command(hal_command, "run", "--device", "cpu", str(script)),
                    "python, import torch", "at most 0.15 s more"),
        ]  # fmt: skip
        main("launch", "What hal run costs", [Group("ms", steps, repeats=10), Group("s", start)])
