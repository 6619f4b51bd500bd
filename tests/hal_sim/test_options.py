# SPDX-License-Identifier: Apache-2.0
"""What follows a simulated device's name."""

import subprocess
import sys
from pathlib import Path

import pytest

import hal
from hal.errors import ConfigError
from hal_sim.chips import CHIPS
from hal_sim.options import Options
from hal_sim.schedule import Schedule

HAL = str(Path(sys.executable).parent / "hal")


def test_options_stand_in_any_order():
    found = Options.parse("strict/count=8/splitk=4/memory=24GiB/grain=32", CHIPS["h200"])
    assert found == Options(CHIPS["h200"], Schedule(split_k=4, grain=32), strict=True, memory=24 * 2**30, count=8)
    assert Options.parse("", CHIPS["h200"]) == Options(CHIPS["h200"], Schedule())


@pytest.mark.parametrize(
    ("text", "says"),
    [("memory=24", "no such amount of memory: '24'"), ("memory=0GiB", "amount"), ("memory=1.5GiB", "amount"),
     ("memory=-1MiB", "amount"), ("count=0", "no such number of devices: '0'"), ("count=", "no such option"),
     ("count=2/count=2", "has count twice"), ("memory=1GiB/memory=1GiB", "memory twice"), ("strict/strict", "strict twice"),
     ("splitk=0", "no such option: 'splitk=0'"), ("size=3", "no such option"), ("Memory=1GiB", "no such option")],
)  # fmt: skip
def test_what_is_no_option_says_so(text, says):
    with pytest.raises(ConfigError, match=says) as error:
        hal.open_device(f"sim:h200/{text}")
    assert error.value.expected


needs_limit = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone limits a process's private memory")


# In a process of its own: in a test run's, garbage of earlier tests may be given back in between, and be had again.
SIZE = """
import torch
import hal
torch.ones(2**25)  # the threads of the kernels have stacks, which are mapped once
with hal.open_device("sim:h200/memory=256MiB") as device:
    before = device.memory.stats()
    assert before.total == device.info.total_memory == 2**28
    kept = torch.ones(2**25)  # 128 MiB
    assert 2**27 - 2**22 <= before.free - device.memory.stats().free <= 2**27 + 2**22
    try:
        with device.memory.catch_out_of_memory():
            torch.ones(2**26)
    except hal.OutOfMemoryError as error:
        assert error.requested == 2**28
        assert error.stats.total == 2**28
    else:
        raise AssertionError("384 MiB where there are 256")
    assert "resource.RLIMIT_DATA" in " ".join(map(str, device.changes))
    del kept
    torch.ones(3 * 2**24)  # what was given back can be had again
assert torch.ones(2**26).sum() == 2**26
with hal.open_device("sim:h200") as device:
    assert device.memory.stats().total > 2**28
"""


@needs_limit
def test_memory_ends_where_it_was_asked_to_and_is_the_hosts_again_afterwards():
    done = subprocess.run([sys.executable, "-c", SIZE], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


PROGRAM = """
import torch
assert torch.cuda.device_count() == 4
assert {torch.cuda.get_device_properties(i).total_memory for i in range(4)} == {2**30}
torch.cuda.set_device(3)
batch = 2**30
while True:
    try:
        x = torch.zeros(batch, device="cuda")
        break
    except torch.cuda.OutOfMemoryError:
        batch //= 2
assert x.device == torch.device("cuda:3"), x.device
print(batch)
"""


@needs_limit
def test_a_program_sees_as_many_devices_of_that_size_and_looks_for_its_batch(tmp_path):
    (tmp_path / "p.py").write_text(PROGRAM)
    done = subprocess.run(
        [HAL, "run", "--device", "sim:h200/memory=1GiB/count=4", str(tmp_path / "p.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(2**27)]  # 512 MiB: twice as much is all that there is
