# SPDX-License-Identifier: Apache-2.0
"""On a CPU a tensor's side is a rule: what it says, against what CUDA would say, as torch's FakeTensorMode knows it."""

import importlib

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

import hal

# On which side is the tensor that each of these makes? `g` is on the device, `h` on the host.
IDIOMS = {
    "a device by name": "torch.ones(2, device='cuda')",
    "no device": "torch.ones(2)",
    "the host by name": "torch.ones(2, device='cpu')",
    "a list": "torch.tensor([1.0, 2.0])",
    "moved by cuda()": "h.cuda()",
    "moved by to()": "h.to('cuda')",
    "moved by to(other)": "h.to(g)",
    "moved to the host": "g.cpu()",
    "moved to the host by to()": "g.to('cpu')",
    "moved there and back": "g.cpu().cuda()",
    "a dtype on the device": "g.to(torch.float64)",
    "a dtype on the host": "h.to(torch.float64)",
    "a view on the device": "g.view(1, 2)",
    "a view on the host": "h.view(1, 2)",
    "a slice on the host": "h[:1]",
    "detached on the host": "g.cpu().detach()",
    "like one on the device": "torch.zeros_like(g)",
    "like one on the host": "torch.zeros_like(h)",
    "new from the device": "g.new_zeros(3)",
    "new from the host": "h.new_zeros(3)",
    "random on the host": "torch.randn(2)",
    "a range on the host": "torch.arange(3)",
    "an operator on the device": "g * 2 + 1",
    "a host default inside the device's": "h.clone().cuda() + g",
    "a layer on the device": "torch.nn.Linear(2, 2, device='cuda').weight",
    "a layer that was moved": "torch.nn.Linear(2, 2).cuda().weight",
    "an operator on the host": "h + 1",
    "stacked on the host": "torch.stack([h, h])",
    "another dtype of a copy on the host": "g.cpu().float().double().sum()",
    "a layer before it is moved": "torch.nn.Linear(2, 2).weight",
}

WRONG = {
    "an operator on the host",
    "stacked on the host",
    "another dtype of a copy on the host",
    "a layer before it is moved",
}
"""What docs/run.md says is wrong: all of it is on the host, and said to be on the device."""


@pytest.fixture(scope="module")
def truth():
    """What CUDA says of each."""
    torch = importlib.import_module("torch")
    with FakeTensorMode():
        names = {"torch": torch, "g": torch.ones(2, device="cuda"), "h": torch.ones(2)}
        return {idiom: _truth(code, names) for idiom, code in IDIOMS.items()}


def _truth(code, names):
    try:
        return eval(code, dict(names)).device.type
    except RuntimeError as error:
        # Without CUDA even a fake tensor cannot be moved to it; where a move ends needs no witness.
        assert "not linked with support for cuda" in str(error)
        assert "cuda" in code or "(g)" in code
        return "cuda"


@pytest.mark.parametrize("idiom", IDIOMS)
def test_a_tensor_is_where_cuda_has_it_or_wrong_as_the_documentation_says(idiom, truth):
    with hal.adopt("cpu"):
        torch = importlib.import_module("torch")
        names = {"torch": torch, "g": torch.ones(2, device="cuda"), "h": torch.ones(2)}
        exec("found = (" + IDIOMS[idiom] + ").device.type", names)
        found = names["found"]
    if idiom in WRONG:
        assert (found, truth[idiom]) == ("cuda", "cpu"), "this is right now: docs/run.md has to be changed"
    else:
        assert found == truth[idiom]
