# SPDX-License-Identifier: Apache-2.0
"""A program under `hal run` ends well whatever gloo's threads still do."""

import subprocess
import sys
import textwrap

import pytest

from hal.launch import gloo

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a thread does")

# On one core, idle threads get their turn only when the program waits, so that after the last gradient is there they
# have not yet dropped what they held.
LATE = """
    import os, sys
    import torch, torch.distributed as dist

    dist.init_process_group("{backend}", rank=0, world_size=1, store=dist.HashStore())
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1).to("{device}"))
    loss = model(torch.ones(2, 4, device="{device}")).sum()
    late = 0
    for task in map(int, os.listdir("/proc/self/task")):
        with open(f"/proc/self/task/{{task}}/comm") as file:
            if file.read().strip() == "pt_gloo_runloop":
                os.sched_setscheduler(task, os.SCHED_IDLE, os.sched_param(0))
                late += 1
        os.sched_setaffinity(task, {{min(os.sched_getaffinity(0))}})
    print("late", late, flush=True)
    loss.backward()
    {ending}
"""


@pytest.mark.parametrize("attempt", range(2))
def test_threads_that_are_late_are_waited_for(attempt):
    # Plain Python, since the report's writing gives them a turn, too. Without the wait 20 of 22 such processes aborted.
    ending = "from hal.launch import gloo; gloo.settle()"
    code = textwrap.dedent(LATE.format(backend="gloo", device="cpu", ending=ending))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240)
    assert (done.stdout, done.returncode) == ("late 2\n", 0), done.stderr


@pytest.mark.parametrize(
    ("ending", "status"), [("", 0), ("raise ValueError('the program failed')", 1), ("sys.exit(3)", 3)]
)
def test_a_program_ends_with_its_own_status(program, ending, status):
    done = program(LATE.format(backend="nccl", device="cuda", ending=ending))
    assert (done.stdout, done.returncode) == ("late 2\n", status), done.stderr
    assert "terminate called" not in done.stderr


@pytest.mark.parametrize("asks", ["", "w.get_future()", "w.is_completed()"])
def test_a_rank_may_end_before_its_peer_does_whatever_it_has_asked_for(program, asks):
    done = program(f"""
        import os, time
        import torch, torch.distributed as dist

        class Slow:
            def __del__(self, sleep=time.sleep):
                sleep(1.5)

        dist.init_process_group("nccl")
        dist.barrier()
        if dist.get_rank() == 0:
            slow = Slow()  # Python is long in ending
            w = dist.reduce_scatter_tensor(torch.ones(2).cuda(), torch.ones(4).cuda(), async_op=True)
            {asks}
        else:
            time.sleep(1.5)
            os._exit(0)  # meanwhile
    """, options=("--device", "cpu", "--nproc", "2"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "terminate" not in done.stderr


def test_threads_that_never_rest_hold_up_the_end_for_a_second_only(monkeypatch):
    looks = iter(range(1_000_000))
    monkeypatch.setattr(gloo, "_threads", lambda: {"7": ("S", str(next(looks)))})
    monkeypatch.setattr(gloo, "PATIENCE_S", 0.05)
    gloo.settle()
    assert next(looks) > 2
