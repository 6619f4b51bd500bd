# SPDX-License-Identifier: Apache-2.0
"""`hal run` as a user calls it: real programs in real processes, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from hal.launch.redirection import visible

HAL = str(Path(sys.executable).parent / "hal")


WRAPS = """
import builtins
def wrapper(*given, _before=builtins.__import__, **named):
    return _before(*given, **named)
builtins.__import__ = wrapper
"""
"""A package that wraps Python's import, as lazy importers and profilers do."""


def hal_run(*arguments, **environment):
    """Run `hal run` with arguments."""
    return subprocess.run([HAL, "run", *arguments], capture_output=True, text=True, check=False,
                          env={**os.environ, **environment}, timeout=240)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["no-such-file.py"], 2, "there is no file 'no-such-file.py'"),
        (["--report", "/no/such/folder/r.json", __file__], 2, "the report cannot be written"),
        (["--nproc", "0", __file__], 2, "nproc"),
        (["--device", "nonsense", __file__], 3, "no backend of this name"),
        (["--device", "cpu:7", __file__], 3, "cpu"),
        ([], 2, "SCRIPT"),
    ],
)
def test_what_is_wrong_is_said_before_the_program_starts(arguments, status, words):
    done = hal_run(*arguments)
    assert done.returncode == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 8


def test_a_program_finds_what_plain_python_gives_it(program, tmp_path):
    (tmp_path / "beside.py").write_text("here = True\n")
    done = program(
        """
        import sys, os, beside
        if __name__ == "__main__":
            print(sys.argv[1:], os.path.basename(__file__), sys.modules["__main__"].__file__ == __file__, __spec__)
            print("site" in " ".join(sys.path), "TORCH_DEVICE_BACKEND_AUTOLOAD" in os.environ)
            sys.exit(7)
        """,
        "--device", "cuda:0", "-x",
    )  # fmt: skip
    assert done.stdout.splitlines() == ["['--device', 'cuda:0', '-x'] train.py True None",
                                        f"{'site' in str(Path(json.__file__))or True} False"]  # fmt: skip
    assert done.returncode == 7


def test_a_module_runs_as_with_python(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "__main__.py").write_text(
        "import sys, torch\nprint(__package__, sys.argv[1:], torch.ones(1, device='cuda').device)\n"
    )
    done = hal_run("--device", "cpu", "-m", "package", "a", "-b", PYTHONPATH=str(tmp_path))
    assert done.stdout.split("\n")[0] == "package ['a', '-b'] cuda:0"
    assert done.returncode == 0


def test_a_traceback_shows_the_programs_lines_and_not_ours(program):
    done = program(
        """
        import torch
        def step():
            return torch.zeros(2, device="cuda:9")
        step()
        """
    )
    assert done.returncode == 1
    assert "invalid device ordinal" in done.stderr
    assert 'return torch.zeros(2, device="cuda:9")' in done.stderr
    assert "launch/" not in done.stderr.partition("Traceback")[2].partition("hal run:")[0]


def test_every_kind_of_child_is_redirected(program):
    done = program(
        """
        import multiprocessing, sys, subprocess
        import torch
        from torch.utils.data import DataLoader, Dataset

        class Squares(Dataset):
            def __len__(self):
                return 8
            def __getitem__(self, index):
                assert torch.cuda.is_available()
                return torch.tensor(float(index * index))

        def child(queue):
            queue.put(str(torch.ones(1, device="cuda").device))

        if __name__ == "__main__":
            for method in ("spawn", "fork", "forkserver"):
                context = multiprocessing.get_context(method)
                queue = context.Queue()
                process = context.Process(target=child, args=(queue,))
                process.start()
                print(method, queue.get(timeout=200))
                process.join()
            total = sum(batch.cuda().sum() for batch in DataLoader(Squares(), batch_size=2, num_workers=2, pin_memory=True))
            print("loader", total.item(), total.device)
            code = "import torch; print('program', torch.ones(1).cuda().device)"
            print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip())
            code = "import sys; print('no torch', 'torch' in sys.modules)"
            print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip())
        """
    )
    assert done.stdout.splitlines() == [
        "spawn cuda:0", "fork cuda:0", "forkserver cuda:0", "loader 140.0 cuda:0", "program cuda:0", "no torch False",
    ], done.stderr  # fmt: skip


def test_the_report_names_lines_of_the_program_and_not_of_pythons_wrappers_nor_what_torch_does_by_itself(
    program, tmp_path
):
    done = program(
        """\
        import copy, torch
        torch.cuda.amp.GradScaler(enabled=False)  # deprecated: typing_extensions wraps it
        copy.deepcopy(torch.nn.Linear(2, 2).cuda())
        import torch._dynamo  # and whatever it imports registers kernels for CUDA
        """,
        options=("--device", "cpu", "--report", str(tmp_path / "report.json")),
    )
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "report.json").read_text())["entries"]
    assert {Path(e["file"]).name for e in entries} == {"train.py"}
    assert [(e["api"], e["line"]) for e in entries if "Grad" in e["api"]] == [("torch.amp.GradScaler", 2)]
    assert not [e for e in entries if e["line"] == 4]


def test_the_report_names_lines_calls_and_what_was_not_as_on_cuda(program, tmp_path):
    done = program(
        """
        import torch
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for _ in range(3):
            x = torch.ones(2).to(device)
        torch.cuda.memory._record_memory_history()
        try:
            torch.cuda.CUDAGraph()
        except RuntimeError as error:
            print("refused", str(error).splitlines()[0])
        """,
        options=("--device", "cpu", "--report", str(tmp_path / "report.json")),
    )
    assert done.returncode == 0
    assert "torch.cuda.CUDAGraph at" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["schema"] == "hal.run/1"
    assert [device["id"] for device in report["devices"]] == ["cpu"]
    found = {(e["kind"], e["api"], Path(e["file"]).name, e["line"]): e["calls"] for e in report["entries"]}
    assert found["belief", "torch.cuda.is_available", "train.py", 3] == 1
    assert found["redirected", "torch.Tensor.to", "train.py", 5] == 3
    assert found["idle", "torch.cuda.memory._record_memory_history", "train.py", 6] == 1
    assert found["refused", "torch.cuda.CUDAGraph", "train.py", 8] == 1
    assert "calls without effect: 1" in done.stderr
    assert "train.py:8: torch.cuda.CUDAGraph" in done.stderr


def test_a_sitecustomize_of_the_users_runs_and_may_import_torch(program, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import torch\nmine = torch.ones(1).cuda().device\n")
    done = program("import sitecustomize, torch; print(sitecustomize.mine, torch.cuda.is_available())",
                   PYTHONPATH=str(site))  # fmt: skip
    assert done.stdout == "cuda:0 True\n", done.stderr


def test_a_program_may_hide_the_devices_from_itself(program):
    done = program(
        """
        import os
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        import torch
        print(torch.cuda.is_available(), torch.cuda.device_count(), torch.ones(1).device)
        try:
            torch.cuda.current_device()
        except RuntimeError as error:
            print("No CUDA GPUs are available" in str(error))
        torch.ones(1).cuda()
        """
    )
    assert done.stdout == "False 0 cpu\nTrue\n"
    assert "No CUDA GPUs are available" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's private memory")
def test_a_share_of_the_memory_that_is_used_up_is_full_from_the_next_tensor_on(program):
    done = program(
        """
        import torch
        for share in 1e-9, 0.0:
            torch.cuda.set_per_process_memory_fraction(share)
            assert torch.cuda.get_per_process_memory_fraction() == share
            try:
                torch.empty(2**28, device="cuda")
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
            else:
                raise AssertionError("a full device gave memory")
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.empty(2**28, device="cuda")
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [("", 2, []), ("0", 2, [0]), ("1,0", 2, [1, 0]), ("0,5,1", 2, [0]), ("-1", 2, []), ("0,0", 2, []),
     ("GPU-8932f937,GPU-1", 2, [0, 1]), ("x", 2, [])],
)  # fmt: skip
def test_the_variable_is_read_as_cuda_reads_it(text, count, expected):
    assert visible(text, count) == expected


def test_ranks_train_together_with_nccl_on_the_cpu(program, tmp_path):
    done = program(
        """
        import os, torch, torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel as DDP

        dist.init_process_group("nccl")
        rank = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(rank)
        assert dist.get_backend() == "nccl" and torch.cuda.device_count() == 2
        torch.manual_seed(0)
        model = DDP(torch.nn.Linear(4, 1).cuda(), device_ids=[rank])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        first = None
        for _ in range(20):
            x = torch.randn(16, 4, device="cuda")
            assert x.device == torch.device("cuda", rank)
            loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
            first = loss.item() if first is None else first
            optimizer.zero_grad(); loss.backward(); optimizer.step()
        total = torch.ones(1, device="cuda")
        dist.all_reduce(total, op=dist.ReduceOp.AVG)
        # One write: with Python's unbuffered output, the pieces of two ranks would mix.
        os.write(1, f"rank {rank} {total.item()} {loss.item() < first}\\n".encode())
        dist.destroy_process_group()
        """,
        options=("--device", "cpu", "--nproc", "2", "--report", str(tmp_path / "r.json")),
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:2]) == ["rank 0 1.0 True", "rank 1 1.0 True"]
    assert json.loads((tmp_path / "r.json").read_text())["processes"] >= 2


@pytest.mark.parametrize("wraps", ["", WRAPS], ids=["", "wrapped"])
def test_a_rank_whose_package_brings_torch_sees_cuda_in_all_of_its_modules(tmp_path, wraps):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text(f"{wraps}\nfrom package.inner import torch")
    (package / "inner.py").write_text("from package.innermost import torch")
    (package / "innermost.py").write_text("import torch")
    (package / "train.py").write_text(
        "import torch, package, torch.cuda.random, package.inner as inner\n"
        "from torch.cuda import device_count\n"
        "for seen in torch, package.torch, inner.torch, package.innermost.torch:\n"
        "    assert seen.cuda.is_available() and device_count() == 2, type(seen)\n"
        "print('all see it')"
    )
    done = subprocess.run([HAL, "run", "--device", "cpu", "--nproc", "2", "-m", "package.train"], capture_output=True,
                          text=True, cwd=tmp_path, check=False, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all see it") == 2


def test_sharded_models_and_meshes_work_on_the_cpu(program):
    done = program(
        """
        import os, sys, torch, torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, fully_shard

        rank = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(rank)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", rank))
        mesh = init_device_mesh("cuda", (2,), mesh_dim_names=("shard",))
        group = dist.new_group([0, 1], backend="nccl")
        assert dist.get_backend(group) == "nccl" and dist.is_nccl_available()

        def falls(model):
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
            losses = []
            for step in range(12):
                x = torch.randn(8, 6, device="cuda", generator=torch.Generator("cuda").manual_seed(step % 2))
                loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return losses[-1] < losses[0]

        torch.manual_seed(0)
        first = FSDP(torch.nn.Linear(6, 1).cuda(), device_id=torch.cuda.current_device(), use_orig_params=True)
        second = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 1)).cuda()
        for layer in second:
            fully_shard(layer, mesh=mesh)
        fully_shard(second, mesh=mesh)
        os.write(1, f"{falls(first)} {falls(second)}{chr(10)}".encode())
        dist.destroy_process_group()
        """,
        options=("--device", "cpu", "--nproc", "2"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True True\nTrue True\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_losses_are_the_same_bits_as_of_the_program_ported_by_hand(dtype):
    script = str(Path(__file__).parent / "gpt.py")
    redirected = hal_run("--device", "cpu", script, "cuda", dtype)
    by_hand = subprocess.run([sys.executable, script, "cpu", dtype], capture_output=True, text=True, check=True)
    assert redirected.stdout == by_hand.stdout, redirected.stderr
    losses = [float.fromhex(line) for line in by_hand.stdout.split()]
    assert losses[-1] < losses[0]


def test_a_rank_that_fails_gives_its_status(program):
    done = program("import os, sys; sys.exit(5 if os.environ['RANK'] == '1' else 0)",
                   options=("--device", "cpu", "--nproc", "2"))  # fmt: skip
    assert done.returncode == 5


def test_ctrl_c_ends_the_program_and_leaves_no_children(tmp_path, eventually):
    file = tmp_path / "train.py"
    file.write_text(
        "import multiprocessing, time, torch\n"
        "def child():\n    time.sleep(3600)\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.get_context('fork').Process(target=child, daemon=True).start()\n"
        "    print('ready', flush=True)\n    time.sleep(3600)\n"
    )
    # A test run in the background ignores interrupts, and its children would inherit that.
    process = subprocess.Popen(
        [HAL, "run", "--device", "cpu", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 1
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode in (-signal.SIGINT, 130)
    assert "KeyboardInterrupt" in errors
    assert eventually(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in children))


def test_nothing_is_left_in_the_temporary_folder(program, tmp_path):
    program("import torch; torch.cuda.synchronize()", TMPDIR=str(tmp_path))
    assert list(tmp_path.glob("hal-run-*")) == []


def test_torchruns_options_are_those_that_torchrun_has():
    from torch.distributed.run import get_args_parser

    from hal.launch.ranks import OPTIONS

    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert [name for name in OPTIONS if f"--{name}" not in known] == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_written_on_the_device_are_read_anywhere(program, tmp_path):
    done = program(
        """
        import torch, torch.distributed.checkpoint as dcp
        model = torch.nn.Linear(4, 4).cuda()
        dcp.save({"model": model.state_dict()}, checkpoint_id="parts")
        torch.save(model.state_dict(), "whole.pt")
        again = {"model": torch.nn.Linear(4, 4).cuda().state_dict()}
        dcp.load(again, checkpoint_id="parts")
        assert torch.equal(again["model"]["weight"], model.weight) and again["model"]["weight"].is_cuda
        """
    )
    assert done.returncode == 0, done.stderr
    import torch
    import torch.distributed.checkpoint as dcp

    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    parts = {"model": torch.nn.Linear(4, 4).state_dict()}
    dcp.load(parts, checkpoint_id=str(tmp_path / "parts"))
    assert torch.equal(whole["weight"], parts["model"]["weight"])
    assert whole["weight"].device.type == "cpu"
