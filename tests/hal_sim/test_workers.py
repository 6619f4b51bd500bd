# SPDX-License-Identifier: Apache-2.0
"""Threads of the compiled core: many callers at once, and children that were forked at any moment."""

import subprocess
import sys
import threading

import pytest
import torch

from hal.matrix_unit import MATRIX_UNITS
from hal_sim import native, product

UNIT, FORMATS = MATRIX_UNITS["sm_90"]["bfloat16"], ("bfloat16", "bfloat16")


@pytest.fixture(autouse=True)
def three_threads():
    if native.library() is None:
        pytest.skip("there is no compiled core")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def test_many_callers_at_once_each_have_their_product():
    draw = torch.Generator().manual_seed(1)
    given = [torch.randn(2, 256, 256, generator=draw).bfloat16() for _ in range(4)]
    expected = [product.multiply(a, a, UNIT, FORMATS) for a in given]
    wrong = []

    def work(a, want):
        torch.set_num_threads(3)  # which OpenMP keeps for each thread
        wrong.extend(1 for _ in range(20) if not torch.equal(product.multiply(a, a, UNIT, FORMATS), want))

    callers = [threading.Thread(target=work, args=each) for each in zip(given, expected, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


FORKING = """
import os, threading, torch
from hal.matrix_unit import MATRIX_UNITS
from hal_sim import product

unit, formats = MATRIX_UNITS["sm_90"]["bfloat16"], ("bfloat16", "bfloat16")
torch.set_num_threads(3)
a = torch.randn(1, 256, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
want = product.multiply(a, a, unit, formats).numpy().tobytes()
done = threading.Event()

def busy():
    torch.set_num_threads(3)
    while not done.is_set():
        product.multiply(a, a, unit, formats)

other = threading.Thread(target=busy)
other.start()
for _ in range(20):
    child = os.fork()
    if not child:
        # Compared without torch, whose own threads a forked child must not ask for (OpenMP waits for ever).
        found = [product.multiply(a, a, unit, formats).numpy().tobytes() for _ in range(3)]
        os._exit(0 if found == [want] * 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
done.set()
other.join()
"""


def test_children_that_were_forked_while_another_thread_multiplied_multiply():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
