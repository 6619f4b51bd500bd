# SPDX-License-Identifier: Apache-2.0
"""A small GPT on characters, written for CUDA the way nanoGPT is: `python train_cuda.py [TEXT]`."""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

ddp = int(os.environ.get("RANK", -1)) != -1
if ddp:
    dist.init_process_group("nccl")
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
else:
    device = "cuda"
rank, world = (dist.get_rank(), dist.get_world_size()) if ddp else (0, 1)
torch.manual_seed(1337)
torch.backends.cuda.matmul.allow_tf32 = False

text = Path(sys.argv[1]).read_text() if len(sys.argv) > 1 else "to be, or not to be, that is the question. " * 50
alphabet = sorted(set(text))
data = torch.tensor([alphabet.index(character) for character in text])
width, heads, depth, length, batch, steps = 64, 4, 2, 32, 8, 20
draws = torch.Generator().manual_seed(rank)


def get_batch():
    starts = torch.randint(len(data) - length - 1, (batch,), generator=draws)
    x = torch.stack([data[i : i + length] for i in starts])
    y = torch.stack([data[i + 1 : i + 1 + length] for i in starts])
    return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


letters = len(alphabet)
model = nn.Sequential(nn.Embedding(letters, width), *(Block() for _ in range(depth)), nn.Linear(width, letters))
model = model.to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
if ddp:
    model = DistributedDataParallel(model, device_ids=[int(os.environ["LOCAL_RANK"])])

for step in range(steps):
    start = time.perf_counter()
    x, y = get_batch()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    if rank == 0:
        print(f"step {step}: loss {loss.item():.6f}")
        print(f"{1000 * (time.perf_counter() - start):.1f} ms", file=sys.stderr)

if rank == 0:
    print(f"{torch.cuda.get_device_name()}: at most {torch.cuda.max_memory_allocated()} bytes", file=sys.stderr)
    torch.save(model.state_dict(), "model.pt")
if ddp:
    dist.destroy_process_group()
