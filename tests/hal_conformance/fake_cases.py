# SPDX-License-Identifier: Apache-2.0
"""A small suite, a device and implementations, good and bad, for the tests of the running half.

Workers import this module by name; the tests put its folder on the path.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from hal.backend import DeviceInfo
from hal.contract import Contract
from hal.errors import Absent, Broken, UnknownDevice, UnsupportedOperation
from hal.support import Support
from hal_conformance.case import Footprint
from hal_conformance.numerics.absent import is_absent
from hal_conformance.verdicts import Judgement, Status


@dataclass(frozen=True)
class Doubling:
    """Calls `ops.double` on a few elements; the right answer is known exactly."""

    name: str
    family: str = "combine"
    what: str = "Doubles numbers.\n\nThe bound is zero."
    needs: tuple[str, ...] = ("double",)
    multiplies: bool = True
    size: tuple[int, int] = (0, 0)

    def presets(self):
        return ("a", "b")

    def dtypes(self):
        return ("float32", "bfloat16")

    def scales(self, preset):
        return ("tiny", "small", "full")

    def footprint(self, p):
        return Footprint(*self.size)

    def inputs(self, p):
        import ml_dtypes

        dtype = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}[p.dtype]
        return {"x": (np.arange(6).reshape(2, 3) + p.seed).astype(dtype), "empty": np.zeros((0, 4), np.int64)}

    def run(self, ops, tensors, p):
        return ops.double(tensors["x"])

    def judge(self, inputs, outputs, p, contract):
        y = outputs.get("y")
        if y is None or y.shape != (2, 3) or y.dtype != inputs["x"].dtype:
            return Judgement(Status.FAIL_STRUCTURE, detail="not the y that was expected")
        off = np.abs(y.astype(np.float64) - 2 * inputs["x"].astype(np.float64))
        worst = float(np.where(is_absent(y), 0.0, off).max())
        return Judgement(
            Status.EXACT if worst == 0 else Status.FAIL_NUMERIC, worst, {"bound": worst}, f"off by {worst}"
        )


@dataclass(frozen=True)
class BadJudge(Doubling):
    name: str = "broken.judge"

    def judge(self, inputs, outputs, p, contract):
        raise ZeroDivisionError("the judge fell\nover \x1b[31m")


HUGE = (
    Doubling("huge.inputs", size=(1 << 50, 0)),
    Doubling("huge.outputs", size=(0, 1 << 40)),
)
ALL = (Doubling("double.one"), Doubling("double.two", family="layer"), *HUGE)


def by_name(name):
    return {case.name: case for case in (*ALL, BadJudge())}[name]


class Device:
    def __init__(self, name):
        import torch

        self.info = DeviceInfo(name, "fake", "nobody", "[red]fake[/red] \x1b[2J", None, None, "cpu")
        self.torch_device = torch.device("cpu")
        self.contract = Contract()
        self.changes = ()

    def versions(self):
        return {"driver": None}

    def not_simulated(self):
        return dict(left_to_the_cpu)

    def synchronize(self):
        if poisoned:
            raise RuntimeError("an earlier kernel failed")

    def support(self, operator, dtype):
        name = str(dtype)
        if self.info.id == "fake:no-bf16" and name == "torch.bfloat16":
            return Support("unsupported", "no such units")
        return Support("native", "tried")

    def close(self):
        pass


poisoned = False
left_to_the_cpu = {}


def open_device(name):
    if name == "absent":
        raise Absent("no such card", device=name)
    if name == "broken":
        raise Broken("the driver is dead", device=name)
    if name == "unknown":
        raise UnknownDevice("no such backend", device=name)
    if name == "raises":
        raise RuntimeError("vendor says no")
    if name == "exits":
        os._exit(7)
    if name == "hangs":
        time.sleep(600)
    return Device(name)


def open_silent(basis):
    """Open a simulated CDNA2, whose backend does not say that its unit takes small float16 operands for zero."""
    import hal

    device = hal.open_device("sim:mi250")
    keeps = {name: replace(rule, flushes_below=0.0) for name, rule in device.contract.matmul.items()}
    device.contract = replace(device.contract, matmul=keeps, basis=basis, evidence="nobody knows")
    return device


def _on_amx():
    """Whether oneDNN computes with AMX here, on a processor that has it: its own switch says so, for a whole process."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA") != "AVX512_CORE_BF16"


def open_leaking(name):
    """Open a device on which the fault of `known` shows."""
    from hal_conformance.execution import known

    known._leaks = _on_amx
    return Device(name)


def open_leaking_anyway(name):
    """Open a device on which the fault shows in any process."""
    from hal_conformance.execution import known

    known._leaks = lambda: True
    return Device(name)


def open_sound(name):
    """Open a device on which it does not, whatever the processor."""
    from hal_conformance.execution import known

    known._leaks = lambda: False
    return Device(name)


def _has_the_fault(x):
    """Whether a product with these operands would have the fault of `known`, on a processor that has it."""
    import torch

    return x.dtype == torch.bfloat16 and _on_amx()


def _leaking(x):
    import torch

    return {"y": x * 2 + (torch.nan if _has_the_fault(x) else 0.0)}


def _wrong_with_the_library(x):
    """Wrong by a number, where the fault of `known` leaves NaN and infinities only."""
    return {"y": x * 2 + _has_the_fault(x)}


def _nan_by_itself(x):
    """NaN by itself where the library that has the fault is on."""
    import torch

    return {"y": x * 2 + (torch.nan if x.dtype == torch.bfloat16 and torch._C._get_mkldnn_enabled() else 0.0)}


_leaked = []


def _leaking_once(x):
    """NaN at the first call in a process, as of memory that nobody has written to."""
    import torch

    if x.dtype != torch.bfloat16 or _leaked:
        return {"y": x * 2}
    _leaked.append(x)
    return {"y": x * 2 + torch.nan}


def _calls_of_all_processes():
    """Count, in a file that a test made, the calls before this one."""
    with Path(os.environ["CALLS"]).open("a+") as file:
        file.write(".")
        return file.tell() - 1


def _leaking_in_the_first_process(x):
    """NaN the first time of all, whatever library computes."""
    import torch

    leaks = x.dtype == torch.bfloat16 and _calls_of_all_processes() == 0
    return {"y": x * 2 + (torch.nan if leaks else 0.0)}


def _leaking_in_two_processes(x):
    """NaN until two processes have run, such as until a cache is filled, whatever library computes."""
    import torch

    leaks = x.dtype == torch.bfloat16 and _calls_of_all_processes() < 2
    return {"y": x * 2 + (torch.nan if leaks else 0.0)}


def _leaking_at_every_third_call(x):
    """NaN at every third call of all processes, whatever library computes."""
    import torch

    leaks = x.dtype == torch.bfloat16 and _calls_of_all_processes() % 3 == 0
    return {"y": x * 2 + (torch.nan if leaks else 0.0)}


def _leaking_at_every_second_call(x):
    """NaN at every second call of all processes: with and without by turns, whatever library computes."""
    import torch

    leaks = x.dtype == torch.bfloat16 and _calls_of_all_processes() % 2 == 0
    return {"y": x * 2 + (torch.nan if leaks else 0.0)}


def _leaking_at_times(x):
    """NaN where the fault of `known` is, in another element each time, as of what happens to lie in memory."""
    import torch

    y = x * 2
    if _has_the_fault(x):
        y.view(-1)[_calls_of_all_processes()] = torch.nan
    return {"y": y}


def _left_out(x):
    left_to_the_cpu["addr"] = left_to_the_cpu.get("addr", 0) + 2
    return _right(x)


def _right(x):
    return {"y": x * 2}


good = SimpleNamespace(double=_right)
left_out = SimpleNamespace(double=_left_out)
leaking = SimpleNamespace(double=_leaking)
nan_by_itself = SimpleNamespace(double=_nan_by_itself)
wrong_with_the_library = SimpleNamespace(double=_wrong_with_the_library)
leaking_in_the_first_process = SimpleNamespace(double=_leaking_in_the_first_process)
leaking_in_two_processes = SimpleNamespace(double=_leaking_in_two_processes)
leaking_at_every_third_call = SimpleNamespace(double=_leaking_at_every_third_call)
leaking_at_every_second_call = SimpleNamespace(double=_leaking_at_every_second_call)
leaking_at_times = SimpleNamespace(double=_leaking_at_times)
leaking_once = SimpleNamespace(double=_leaking_once)
wrong = SimpleNamespace(double=lambda x: {"y": x * 2 + 1})
nothing = SimpleNamespace()


class Constructed:
    def double(self, x):
        return _right(x)


class Once:
    """Misbehaves on the first float32 call of preset a, in each worker; `flag` says what it does."""

    def __init__(self, misbehave):
        self.misbehave = misbehave

    def double(self, x):
        if str(x.dtype) == "torch.float32":
            answer = self.misbehave(x)
            if answer is not None:
                return answer
        return _right(x)


def _raise(x):
    raise ValueError("first line\nlast line \x1b[2J")


def _raise_unprintable(x):
    class Odd(Exception):
        def __str__(self):
            raise RuntimeError

    raise Odd


def _flood(x):
    for _ in range(64):
        print("x" * 65536)
        print("y" * 65536, file=sys.stderr)
    os.write(1, b"z" * 1_000_000)


def _delete_streams(x):
    del sys.stdout, sys.stderr
    os.close(1)


def _poison(x):
    global poisoned
    poisoned = True
    raise RuntimeError("illegal memory access")


def _mutate(x):
    x += 1
    return {"y": (x - 1) * 2}


def _fork(x):
    os.fork()


def _orphan(x):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "hal-test-orphan"])
    time.sleep(600)


def _meta(x):
    return {"y": x.to("meta")}


def _unsupported(x):
    raise UnsupportedOperation("has no doubling", device="fake", what="double")


def _thread(x):
    threading.Thread(target=time.sleep, args=(600,)).start()


def _write_to_wire(x):
    for fd in range(3, 32):
        try:
            os.write(fd, b"garbage" * 100)
        except OSError:
            pass


def _leave_no_grad(x):
    import torch

    torch.set_grad_enabled(False)
    np.seterr(all="raise")


def _leave_a_mode(x):
    """Leave what this process cannot get rid of: a mode that was there is gone."""
    import torch

    torch.set_default_device("cpu")


def _leave_and_raise(x):
    _leave_no_grad(x)
    raise ValueError("and left it")


def _leave_and_refuse(x):
    _leave_no_grad(x)
    _unsupported(x)


def _replace_torch(x):
    """What the worker itself calls for every case."""
    import torch

    torch.empty = None
    return _right(x)


def _replace_numpy(x):
    np.array_equal, np.asarray = (lambda *a, **k: True), None


def _replace_digests(x):
    from hal_conformance import arrays

    arrays.digests = lambda named: dict.fromkeys(named, "0" * 64)


def _limit_files(x):
    """Leave no room for another open file, and fail."""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    raise ValueError("no room")


def _daemons(x):
    """Start two processes that leave the worker's group: one in a session of its own, one whose parent is gone."""
    command = [sys.executable, "-c", "import time; time.sleep(600)", "hal-test-daemon"]
    subprocess.Popen(command, start_new_session=True)
    if not (child := os.fork()):
        os.setsid()
        subprocess.Popen(command)
        os._exit(0)
    os.waitpid(child, 0)


def forged(**fields):
    """Return what writes a message of its own in the place of the worker's answer, the next to be sent."""

    def write(x):
        from hal_conformance.execution import wire

        send = wire.send
        wire.send = lambda stream, header, arrays=None: send(
            stream, {"event": "observed", "id": header.get("id"), **fields}, arrays
        )

    return Once(write)


def _fake(x):
    from torch._subclasses import FakeTensorMode

    return {"y": FakeTensorMode().from_tensor(x * 2)}


def _functional(x):
    import torch

    return {"y": torch._to_functional_tensor(x * 2)}


def _emptied(x):
    y = x * 2
    y.untyped_storage().resize_(0)
    return {"y": y}


def _leak_a_transform(x):
    import torch

    leaked = []
    torch.func.grad(lambda y: (leaked.append(y), y.sum())[1])(x * 2)
    return {"y": leaked[0]}


def _nested(x):
    import torch

    return {"y": torch.nested.nested_tensor(list(x * 2))}


class Watched:
    """Leaves something in the first call, and is right in a later one only if nothing of it is left."""

    def __init__(self, leave):
        self.leave = leave
        self.called = False

    def double(self, x):
        import torch

        if not self.called:
            self.called = True
            self.leave(x)
            return _right(x)
        alright = torch.is_grad_enabled() and np.geterr()["over"] == "warn" and not torch._C._len_torch_function_stack()
        return _right(x) if alright else {"y": x}


leaves_no_grad = Watched(_leave_no_grad)
leaves_a_mode = Watched(_leave_a_mode)
leaves_and_raises = Watched(_leave_and_raise)
leaves_and_refuses = Watched(_leave_and_refuse)
raises = Once(_raise)
raises_unprintable = Once(_raise_unprintable)
hangs = Once(lambda x: time.sleep(600))
exits = Once(lambda x: os._exit(5))
sys_exits = Once(lambda x: sys.exit(0))
interrupts = Once(lambda x: (_ for _ in ()).throw(KeyboardInterrupt))
killed = Once(lambda x: os.kill(os.getpid(), signal.SIGKILL))
floods = Once(_flood)
deletes_streams = Once(_delete_streams)
poisons = Once(_poison)
mutates = Once(_mutate)
forks = Once(_fork)
orphans = Once(_orphan)
on_meta = Once(_meta)
says_unsupported = Once(_unsupported)
leaves_threads = Once(_thread)
writes_to_wire = Once(_write_to_wire)
wrong_shape = Once(lambda x: {"y": x[:1] * 2})
wrong_dtype = Once(lambda x: {"y": (x * 2).double()})
wrong_keys = Once(lambda x: {"z": x * 2})
complex_dtype = Once(lambda x: {"y": x * 2j})
sparse = Once(lambda x: {"y": (x * 2).to_sparse()})
not_a_dict = Once(lambda x: x * 2)
not_a_tensor = Once(lambda x: {"y": [1, 2]})
enormous = Once(lambda x: {"y": x[:1, :1].expand(2**20, 2**20)})
replaces_torch = Once(_replace_torch)
replaces_numpy = Once(_replace_numpy)
replaces_digests = Once(_replace_digests)
limits_files = Once(_limit_files)
starts_daemons = Once(_daemons)
forges_nothing_more = forged()
forges_no_seconds = forged(status=None, detail="", healthy=True)
forges_seconds = forged(status=None, detail="", healthy=True, seconds="x", hashes=[1])
forges_a_status = forged(status=["PASS"], detail={}, healthy=1, seconds=1.0)
fake = Once(_fake)
functional = Once(_functional)
emptied = Once(_emptied)
leaks_a_transform = Once(_leak_a_transform)
nested = Once(_nested)
starts_daemons_and_hangs = Once(lambda x: (_daemons(x), time.sleep(600)))
