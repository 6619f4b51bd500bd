# SPDX-License-Identifier: Apache-2.0
"""A small language model as people train them on CUDA: run with `cuda` under `hal run`, or with `cpu` by itself.

Prints the loss of every step, exactly. Both runs take the same branches, so that the losses must be the same bits.
The dtype of the softmax is named: autocast's lists for CUDA and for a CPU differ there.
"""

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

device, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.manual_seed(0)
torch.cuda.manual_seed_all(0)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, device=device), nn.LayerNorm(width, device=device)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True, device=device)
        self.router = nn.Linear(width, 4, device=device)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        mask = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device), 1)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        flat = self.norm2(x).flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1, torch.float32).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            out.index_add_(0, token, (expert(flat[token]) * weights[token, slot, None]).to(out.dtype))
        return x + out.view_as(x)


embedding, blocks, head = nn.Embedding(32, 16), nn.Sequential(Block(16), Block(16)), nn.Linear(16, 32)
model = nn.Sequential(embedding, blocks, head).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
generator = torch.Generator().manual_seed(1)
for _ in range(8):
    tokens = (torch.randint(3, (4, 12), generator=generator).cumsum(1) % 32).to(device)
    with torch.autocast(device_type=device, dtype=dtype):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    print(loss.item().hex())
