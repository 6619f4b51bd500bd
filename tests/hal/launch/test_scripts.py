# SPDX-License-Identifier: Apache-2.0
"""torch.jit.script while a CPU is adopted: what is compiled moves tensors without Python, and copies them as CUDA does.

Programs are files of their own here: torch compiles a source, and looks up its names.
"""

import importlib

import pytest
import torch

import hal

PROGRAM = """
import io
import warnings, warnings
import torch
warnings.simplefilter("ignore")

@torch.jit.script
def moves(x):
    y = x.to(torch.device("cuda"), torch.float32, memory_format=torch.contiguous_format)
    return x.to("cuda") + x.cuda() + x.to(torch.device("cuda:0")) + y

@torch.jit.script
def to(x, device: torch.device):
    return x.to(device)

@torch.jit.script
def in_place(x):
    y = x.to("cuda")
    y += 1
    return y

def helper(x):
    return x.cuda()

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x, times: int):
        for i in range(times):
            if times > 1:
                x = x.to("cuda") * 2
            else:
                x = helper(x)
        return self.layer(x).to(torch.float64)

x = torch.ones(1)
print(moves(x).item(), in_place(x).item(), x.item())
print(to(x, torch.device("cuda")).item(), to(x, device=torch.ones(1, device="cuda").device).item())
model = torch.jit.script(Model()).cuda()
file = io.BytesIO()
torch.jit.save(model, file)
file.seek(0)
again = torch.jit.load(file, map_location="cuda")
warnings.simplefilter("ignore")  # that torch.load is not for scripts
for where in ("cpu", "cuda:0"):
    file.seek(0)
    loaded = torch.load(file, map_location=where, weights_only=False)
    assert {str(each.device) for each in loaded.parameters()} == {where}
rows = torch.ones(1, 2)
print([m(rows, n).equal(model(rows * n, 1)) for m in (model, again) for n in (1,)], again(rows, 2).dtype)
"""


def test_scripts_move_tensors(program):
    done = program(PROGRAM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["4.0 2.0 1.0", "1.0 1.0", "[True, True] torch.float64"]


def to(x, device: torch.device):
    return x.to(device)


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
def test_what_was_scripted_before_stays_as_it_was():
    kinds = torch._C.ScriptFunction, torch._C.ScriptMethod
    calls, early = [kind.__call__ for kind in kinds], torch.jit.script(to)
    graph = str(early.graph)
    with hal.adopt("cpu"):
        t = importlib.import_module("torch")
        t.jit.script(t.nn.Linear(2, 2))
        assert early(t.ones(1), t.device("cuda")).tolist() == [1]
    assert [kind.__call__ for kind in kinds] == calls
    assert str(early.graph) == graph
    x = torch.ones(1)
    assert early(x, x.device) is x
