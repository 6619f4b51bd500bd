# SPDX-License-Identifier: Apache-2.0
"""`hal run --nproc` on two hosts: network namespaces that see each other through one cable and nothing else."""

import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HAL = str(Path(sys.executable).parent / "hal")
PROGRAM = """
import os, socket
import torch, torch.distributed as dist

dist.init_process_group("nccl")
rank = dist.get_rank()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
torch.cuda.set_device(device)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1).to(device), device_ids=[device.index])
model(torch.full((2, 4), float(rank + 1), device=device)).sum().backward()
gradient = next(model.parameters()).grad
interfaces = sorted(name for _, name in socket.if_nameindex())
seen = (rank, dist.get_world_size(), torch.cuda.device_count(), gradient[0, 0].item(), interfaces)
# One write: with Python's unbuffered output, the pieces of two ranks would mix.
os.write(1, f"{' '.join(map(str, seen))}{chr(10)}".encode())
dist.destroy_process_group()
"""


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def end(process):
    """End a command that is still there: its agent ends the ranks, which have sessions of their own, if it is asked."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def hosts():
    """Two namespaces, each with one end of a cable."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command `ip`")
    mark = f"{os.getpid() % 10_000}"
    names = [f"hal-{mark}-a", f"hal-{mark}-b"]
    try:
        cables = [f"ha{mark}", f"hb{mark}"]
        try:
            for name in names:
                ip("netns", "add", name)
            ip(
                "link",
                "add",
                cables[0],
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                cables[1],
                "netns",
                names[1],
            )
            for number, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
                ip("-n", name, "address", "add", f"10.213.7.{number}/24", "dev", cable)
                ip("-n", name, "link", "set", cable, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine makes no network namespaces: {error.stderr.decode().strip()}")
        yield list(zip(names, cables, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.parametrize("form", ["rendezvous", "master"])
def test_two_hosts_train_together(form, hosts, tmp_path, eventually):
    program = tmp_path / "train.py"
    program.write_text(textwrap.dedent(PROGRAM))
    with contextlib.ExitStack() as stack:
        running = []
        for number, (name, cable) in enumerate(hosts):
            where = (
                ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.213.7.1:29413", "--rdzv-id", "two",
                 "--rdzv-conf", f"is_host={int(number == 0)}", "--local-addr", f"10.213.7.{number + 1}"]
                if form == "rendezvous" else
                ["--node-rank", str(number), "--master-addr", "10.213.7.1", "--master-port", "29413"]
            )  # fmt: skip
            ranks = ["--device", "cpu", "--nnodes", "2", "--nproc", "2"]
            outputs = [stack.enter_context((tmp_path / f"{name}.{stream}").open("w")) for stream in ("out", "err")]
            process = subprocess.Popen(
                ["ip", "netns", "exec", name, HAL, "run", *ranks, *where, str(program)],
                stdout=outputs[0],
                stderr=outputs[1],
                cwd=tmp_path,
                env={**os.environ, "GLOO_SOCKET_IFNAME": cable, "OMP_NUM_THREADS": "1"},
            )
            stack.callback(end, process)
            running.append(process)
        # Longer than the 300 s for which an agent waits for its peers, so that what failed is seen and not only waited for.
        ended = eventually(lambda: all(process.poll() is not None for process in running), seconds=400)
    said = {path.name: path.read_text() for path in sorted(tmp_path.glob("hal-*"))}
    assert ended, said
    assert [process.returncode for process in running] == [0, 0], said
    lines = sorted(
        line.split(" ", 4) for name, text in said.items() if name.endswith(".out") for line in text.splitlines()
    )
    # The gradient of a sum over two rows of rank + 1, as DDP averages it over ranks 0 to 3: 2 (1 + 2 + 3 + 4) / 4.
    assert [line[:4] for line in lines] == [[str(rank), "4", "2", "5.0"] for rank in range(4)]
    assert {line[4] for line in lines} == {f"['{cable}', 'lo']" for _, cable in hosts}
