# SPDX-License-Identifier: Apache-2.0
"""A tensor's text names the device that the program sees, as CUDA's does."""

import importlib

import pytest

import hal

TEXTS = {
    "torch.ones(2, device='cuda')": "tensor([1., 1.], device='cuda:0')",
    "torch.ones(2, device='cuda').half()": "tensor([1., 1.], device='cuda:0', dtype=torch.float16)",
    "torch.ones(2, device='cuda', requires_grad=True)": "tensor([1., 1.], device='cuda:0', requires_grad=True)",
    "torch.ones(0, 3, device='cuda')": "tensor([], device='cuda:0', size=(0, 3))",
    "torch.ones((), device='cuda')": "tensor(1., device='cuda:0')",
    "torch.nn.Parameter(torch.ones(1, device='cuda'))": "Parameter containing:\ntensor([1.], device='cuda:0', requires_grad=True)",
    "torch.eye(1, device='cuda').to_sparse()": (
        "tensor(indices=tensor([[0],\n                       [0]]),\n       values=tensor([1.]),\n"
        "       device='cuda:0', size=(1, 1), nnz=1, layout=torch.sparse_coo)"
    ),
    "torch.ones(2)": "tensor([1., 1.])",
    "torch.ones(2, device='cuda').cpu()": "tensor([1., 1.])",
    "torch.ones(2, device='meta')": "tensor(..., device='meta', size=(2,))",
}  # fmt: skip


@pytest.mark.parametrize("code", TEXTS)
def test_a_tensor_prints_where_it_is(code):
    with hal.adopt("cpu"):
        shown = repr(eval(code, {"torch": importlib.import_module("torch")}))
    assert shown == TEXTS[code]


def test_after_the_release_it_prints_the_truth():
    with hal.adopt("cpu"):
        made = importlib.import_module("torch").ones(2, device="cuda")
        assert str(made) == "tensor([1., 1.], device='cuda:0')"
    assert repr(made) == "tensor([1., 1.])"
