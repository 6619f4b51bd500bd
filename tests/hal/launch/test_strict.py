# SPDX-License-Identifier: Apache-2.0
"""Changes of meaning: noted in the report under the program's line, and refused there in strict mode."""

import json
import textwrap

import pytest

CHANGES = {
    "another attention kernel": (
        "change",
        "torch.nn.attention.sdpa_kernel",
        """
        q = torch.randn(1, 2, 4, 8, device="cuda")
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):  # here
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
        """,
    ),
    "another attention kernel, by its old name": (
        "change",
        "torch.backends.cuda.sdp_kernel",
        """
        import warnings
        warnings.simplefilter("ignore", FutureWarning)
        q = torch.randn(1, 2, 4, 8, device="cuda")
        with torch.backends.cuda.sdp_kernel(enable_flash=False, enable_math=False):  # here
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
        """,
    ),
    "no plain attention": (
        "change",
        "torch.backends.cuda.enable_math_sdp",
        """
        q = torch.randn(1, 2, 4, 8, device="cuda")
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)  # here
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        """,
    ),
    "an operator that the device lacks": (
        "fallback",
        "torch.histc",
        """
        tokens = torch.tensor([0, 1, 1], device="cuda")
        assert torch.histc(tokens, bins=2, min=0, max=1).tolist() == [1, 2]  # here
        """,
    ),
    "a library that is not here": (
        "change",
        "flash_attn.flash_attn_func",
        """
        from flash_attn import flash_attn_func
        q = torch.randn(1, 4, 2, 8, device="cuda", dtype=torch.bfloat16)
        flash_attn_func(q, q, q)  # here
        """,
    ),
    "a fused optimiser that is not here": (
        "change",
        "apex.optimizers.FusedAdam",
        """
        from apex.optimizers import FusedAdam
        FusedAdam([torch.nn.Parameter(torch.ones(2, device="cuda"))])  # here
        """,
    ),
    "scripted code that asks where it is": (
        "change",
        "torch.jit.script",
        """
        import warnings
        warnings.simplefilter("ignore")
        def on_cuda(x):
            return x.is_cuda
        torch.jit.script(on_cuda)  # here
        """,
    ),
    "what a simulated unit does not reach": (
        "change",
        "linalg_inv_ex",
        """
        x = torch.eye(4, device="cuda")
        torch.linalg.inv(x @ x)  # here
        """,
        "sim:h200",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_meaning_is_noted_and_in_strict_mode_refused_at_its_line(what, program, tmp_path):
    kind, api, code, device = (*CHANGES[what], "cpu")[:4]
    code = f"import torch\n{textwrap.dedent(code)}\nprint('done')\n"
    line = next(number for number, text in enumerate(code.splitlines(), 1) if "# here" in text)
    report = tmp_path / "report.json"

    done = program(code, options=("--device", device, "--report", str(report)))
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    entries = json.loads(report.read_text())["entries"]
    assert [(entry["api"], entry["line"]) for entry in entries if entry["kind"] == kind] == [(api, line)]
    assert f"train.py:{line}: {api}: " in done.stderr

    refused = program(code, options=("--device", device, "--strict", "--report", str(report)))
    assert (refused.returncode, refused.stdout) == (1, "")
    last = refused.stderr.partition("hal run: CUDA was")[0]
    assert f"{device}: {api} at {tmp_path / 'train.py'}:{line} would change its meaning: " in last
    assert "# here" in last
    assert "hal_sim" not in last  # nor the frames of a backend
    entries = json.loads(report.read_text())["entries"]
    assert [(entry["api"], entry["line"]) for entry in entries if entry["kind"] == "refused"] == [(api, line)]
    assert not [entry for entry in entries if entry["kind"] == kind]  # it did not run


def test_what_means_the_same_is_not_refused(program):
    done = program(
        """
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        q = torch.randn(1, 2, 4, 8, device="cuda")
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
        torch.backends.cuda.enable_math_sdp(True)
        assert torch.histc(torch.ones(3, device="cuda"), bins=1).item() == 3
        model = torch.nn.Linear(2, 2).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model(torch.ones(2, 2, device="cuda")).sum().backward()
        optimizer.step()
        torch.cuda.memory._record_memory_history()
        print("done")
        """,
        options=("--device", "cpu", "--strict"),
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert "changes of meaning" not in done.stderr


def test_attention_in_compiled_code_admits_the_same(program):
    done = program(
        """
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attend(q):
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, q, q)

        q = torch.randn(1, 2, 4, 8, device="cuda")
        assert torch.equal(torch.compile(attend, backend="eager", fullgraph=True)(q), attend(q))
        print("done")
        """
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
