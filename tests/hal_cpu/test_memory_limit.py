# SPDX-License-Identifier: Apache-2.0
"""The limit of the process's private memory, each in a process of its own: everything in it feels a kernel limit."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")

PRELUDE = """
import resource
import hal
GIB = 2**30
soft = lambda: resource.getrlimit(resource.RLIMIT_DATA)[0]
before = soft()
a, b = hal.open_device("cpu"), hal.open_device("cpu")
"""


def run(script):
    done = subprocess.run([sys.executable, "-c", PRELUDE + script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_limit_is_listed_among_the_changes_and_close_puts_the_former_one_back():
    run("""
a.memory.limit(20 * GIB)
assert soft() == 20 * GIB
assert [(c.what, c.old, c.new) for c in a.changes] == [("resource.RLIMIT_DATA", None, 20 * GIB)]
a.memory.limit(30 * GIB)
assert soft() == 30 * GIB
a.close()
assert soft() == before
""")


def test_two_handles_share_one_limit_and_the_last_one_lifts_it():
    run("""
a.memory.limit(20 * GIB)
try:
    b.memory.limit(10 * GIB)
except hal.DeviceConflict as error:
    assert "RLIMIT_DATA" in str(error)
else:
    raise AssertionError("two limits at once")
b.memory.limit(20 * GIB)
a.memory.limit(None)
assert soft() == 20 * GIB, "the other handle still holds it"
b.memory.limit(None)
assert soft() == before
b.memory.limit(None)
assert soft() == before
""")


def test_a_limit_above_the_hard_one_is_refused_with_the_hard_one():
    run("""
resource.setrlimit(resource.RLIMIT_DATA, (40 * GIB, 50 * GIB))
try:
    a.memory.limit(60 * GIB)
except hal.ConfigError as error:
    assert str(50 * GIB) in str(error)
else:
    raise AssertionError("above the hard limit")
assert soft() == 40 * GIB
a.memory.limit(50 * GIB)
a.memory.limit(None)
assert soft() == 40 * GIB
""")


@pytest.mark.parametrize("bad", ["1.5e11", "2**65", "0", "-1", "True", "'1'"])
def test_what_is_no_possible_limit_is_a_setting_that_is_wrong(bad):
    assert run(f"""
try:
    a.memory.limit({bad})
except hal.ConfigError:
    print("refused")
assert soft() == before
""") == ["refused"]
