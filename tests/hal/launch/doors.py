# SPDX-License-Identifier: Apache-2.0
"""A program that reaches CUDA through as many doors as it can, for `hal run` and `hal scan`."""

import os
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.cuda import synchronize as wait
from torch.cuda.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

cuda = torch.cuda
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
os.environ.setdefault("MASTER_PORT", "0")
rank = int(os.environ.get("LOCAL_RANK", "0"))
device = torch.device(f"cuda:{rank}" if torch.cuda.is_available() else "cpu")
cuda.set_device(device)
torch.cuda.manual_seed_all(7)
getattr(torch, "cuda").reset_peak_memory_stats()  # noqa: B009
import_module("torch.cuda").empty_cache()

model = nn.Sequential(
    nn.Linear(4, 8, device="cuda"),
    nn.Linear(8, 2),
).cuda()
x = torch.randn(3, 4).to(device, non_blocking=True)
where = {"device": device}
y = torch.zeros(3, 2, **where)
z = torch.ones(3, 2).to(**where)
kinds = [x.device.type == "cuda", x.is_cuda, x.get_device() == rank, "cuda" in str(z.device)]
counts = torch.cuda.LongTensor(4)
n = x.new_zeros(2, device="cuda")
pinned = torch.ones(2).pin_memory()
scaler = GradScaler()
start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
start.record()
with torch.cuda.stream(torch.cuda.Stream()), torch.autocast("cuda", dtype=torch.bfloat16):
    loss = model(x).float().sub(y.to(x.device)).square().mean()
scaler.scale(loss).backward()
end.record()
wait()
passed = start.elapsed_time(end)

dist.init_process_group("nccl", init_method=f"file://{Path.cwd()}/group", rank=0, world_size=1)
parallel = DistributedDataParallel(model, device_ids=[rank])
assert dist.get_backend() == "nccl"
dist.destroy_process_group()
loader = torch.utils.data.DataLoader([x.cpu()], pin_memory=True)
torch.save(model.state_dict(), "model.pt")
state = torch.load("model.pt", map_location="cuda")
print(all(kinds), passed >= 0, len(state), torch.cuda.max_memory_allocated() > 0, parallel.device_ids, len(loader))
