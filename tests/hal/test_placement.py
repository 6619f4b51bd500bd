# SPDX-License-Identifier: Apache-2.0
"""Placing modules, optimisers and batches. "meta" is a device to which torch moves a module by new parameters."""

import collections
import copy
import pickle
import types

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from hal.errors import ConfigError
from hal.placement import BatchMover, place

META, CPU = torch.device("meta"), torch.device("cpu")
Pair = collections.namedtuple("Pair", "x y")


def put(*things, device=META):
    return place("test:0", device, things)


def trained(model, **keywords):
    """An optimiser that has taken a step, so that it has a state."""
    optimizer = torch.optim.Adam(model.parameters(), **keywords)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return optimizer


class Strict(torch.nn.Linear):
    """A module that lets nothing be set once it is made."""

    ready = False

    def __init__(self):
        super().__init__(2, 2)
        self.ready = True

    def __setattr__(self, name, value):
        if self.ready:
            raise AttributeError(f"{name} is fixed")
        super().__setattr__(name, value)


class Scalar(torch.nn.Module):
    """A parameter without dimensions, such as a temperature."""

    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.tensor(1.0))


@pytest.mark.parametrize("device", [CPU, META], ids=str)
@pytest.mark.parametrize("make", [lambda: torch.jit.script(torch.nn.Linear(2, 2)), Strict], ids=["scripted", "strict"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_modules_that_let_nothing_be_set_are_moved(make, device):
    module = make()
    assert put(module, device=device) == (module,)
    assert {parameter.device for parameter in module.parameters()} == {device}


def test_a_parameter_that_modules_share_stays_one():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    second.weight = first.weight
    old = first.weight
    put(torch.nn.ModuleList([first, first]), second)
    assert second.weight is first.weight
    assert first.weight is not old  # or torch has learnt to keep it, and this file needs another device


def test_an_optimiser_follows_its_model_wherever_it_stands_in_the_call():
    model = torch.nn.Linear(2, 2)
    optimizer = trained(model)
    assert put(optimizer, model) == (optimizer, model)
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert list(optimizer.state) == list(model.parameters())
    assert optimizer.state[model.weight]["exp_avg"].device == META


@pytest.mark.parametrize(("capturable", "where"), [(False, CPU), (True, META)])
def test_a_scalar_parameters_state_moves_and_only_the_step_count_stays(capturable, where):
    model = Scalar()
    optimizer = trained(model)
    optimizer.param_groups[0]["capturable"] = capturable
    put(model, optimizer)
    state = optimizer.state[model.temperature]
    assert (state["exp_avg"].dim(), state["exp_avg"].device, state["exp_avg_sq"].device) == (0, META, META)
    assert state["step"].device == where


def test_states_that_lie_in_lists_and_dicts_move_too():
    model = torch.nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.LBFGS(model.parameters())
    optimizer.state[model.weight] = {"old_dirs": [torch.ones(4)], "more": {"step": torch.ones(()), "x": torch.ones(2)}}
    put(model, optimizer)
    state = optimizer.state[model.weight]
    assert (state["old_dirs"][0].device, state["more"]["x"].device) == (META, META)
    assert state["more"]["step"].device == CPU


@pytest.mark.parametrize(
    "wrong",
    [
        object(),
        3,
        "text",
        {"lr": 0.1},
        (1, 2),
        {"model": torch.nn.Linear(2, 2)},
        (torch.ones(2), torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])),
        torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]),
    ],
    ids=lambda wrong: type(wrong).__name__,
)
def test_nothing_is_moved_if_one_thing_cannot_be(wrong):
    model, tensor = torch.nn.Linear(2, 2), torch.ones(2)
    with pytest.raises(ConfigError, match="test:0"):
        put(model, tensor, wrong)
    assert {parameter.device for parameter in model.parameters()} == {CPU}


def test_a_module_without_values_or_without_a_shape_is_refused_before_anything_is_moved():
    model = torch.nn.Linear(2, 2)
    empty = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2, affine=False, device="meta"))
    with pytest.raises(ConfigError, match=r"1.running_mean of this Sequential is on the meta(?s:.*)to_empty"):
        put(model, empty, device=torch.device("cuda", 0))  # never reached
    lazy = torch.nn.Sequential(torch.nn.LazyLinear(2))
    for device in (META, CPU):
        with pytest.raises(ConfigError, match=r"0.weight of this Sequential has no shape yet(?s:.*)forward pass"):
            put(model, lazy, device=device)
    optimizer = torch.optim.SGD(lazy.parameters())
    with pytest.raises(ConfigError, match=r"parameter of no shape yet on cpu(?s:.*)together with its model"):
        put(model, optimizer)
    assert {parameter.device for parameter in (*model.parameters(), *lazy.parameters())} == {CPU}
    lazy(torch.ones(1, 3))
    assert put(lazy, optimizer) == (lazy, optimizer)


class Stubborn(torch.nn.Linear):
    """A module that refuses to move, as quantised ones do."""

    def to(self, *_, **__):
        raise ValueError("`.to` is not supported for 4-bit models")


def test_what_refuses_to_move_is_named_with_what_is_moved_and_what_is_not():
    first, stubborn, last = torch.nn.Linear(2, 2), Stubborn(2, 2), torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError) as caught:
        put(torch.ones(2), first, stubborn, trained(last), last)
    assert str(caught.value) == (
        "test:0: argument 3 (Stubborn) cannot be moved: ValueError: `.to` is not supported for 4-bit models\n"
        "  moved before: argument 2 (Linear); not moved: argument 1 (Tensor), argument 4 (Adam), argument 5 (Linear); "
        "itself perhaps in part"
    )
    assert isinstance(caught.value.__cause__, ValueError)
    assert (first.weight.device, stubborn.weight.device, last.weight.device) == (META, CPU, CPU)


@pytest.mark.parametrize(
    "kind", [list, set, frozenset, collections.deque, lambda things: [things], lambda x: [{"x": x}]]
)
@pytest.mark.parametrize("both", [True, False])
def test_modules_and_optimisers_in_a_list_are_no_loader(kind, both):
    model = torch.nn.Linear(2, 2)
    things = [torch.optim.SGD(model.parameters()), model] if both else [torch.optim.SGD(model.parameters())]
    with pytest.raises(ConfigError, match=r"inside a (?s:.*)arguments of their own(?s:.*)device\.prepare\(\*objects\)"):
        put(kind(things))


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: [x], lambda x: (x,), lambda x: [(x, 1)], lambda x: {"x": x}])
def test_an_array_of_numpys_is_not_taken_for_a_loader(kind):
    numpy = pytest.importorskip("numpy")
    with pytest.raises(ConfigError, match=r"array of numpy's(?s:.*)torch\.as_tensor"):
        put(kind(numpy.ones(2)))
    assert put([torch.ones(2), numpy.ones(2)])[0][0].device == META


def test_a_batch_is_moved_as_what_it_is():
    x, y = torch.ones(2), torch.zeros(2)
    mapped, pair, plain, listed = put({"x": x, "deep": [y, {"name": "first"}]}, Pair(x, y), (x, 3), [x, y])
    assert mapped["x"].device == mapped["deep"][0].device == META
    assert mapped["deep"][1] == {"name": "first"}
    assert isinstance(pair, Pair)
    assert pair.y.device == META
    assert (plain[0].device, plain[1]) == (META, 3)
    assert [item.device for item in listed] == [META, META]
    assert x.device == CPU


def test_what_can_move_itself_does():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    encoding = types.SimpleNamespace(to=lambda device: f"moved to {device}")
    moved, said = put((packed, encoding))[0]
    assert isinstance(moved, PackedSequence)
    assert (moved.data.device, moved.batch_sizes.device) == (META, CPU)
    assert said == "moved to meta"
    assert put(encoding) == ("moved to meta",)


def test_a_list_of_batches_and_a_loader_are_moved_as_they_are_fetched():
    data = torch.utils.data.TensorDataset(torch.ones(4, 2), torch.zeros(4))
    loader, listed, once = put(
        torch.utils.data.DataLoader(data, batch_size=2), [Pair(torch.ones(2), "name")], iter([torch.ones(2)])
    )
    assert len(loader) == 2
    assert loader.dataset is data
    assert [item.device for batch in loader for item in batch] == [META] * 4
    assert [(batch.x.device, batch.y) for batch in listed] == [(META, "name")]
    assert [tensor.device for tensor in once] == [META]
    again = put(loader, device=CPU)[0]
    assert again.loader is loader.loader, "a loader that was prepared before is not wrapped twice"
    with pytest.raises(AttributeError):
        loader.nothing  # noqa: B018


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_loader_that_was_prepared_can_be_copied(duplicate):
    made = duplicate(BatchMover([{"x": torch.ones(2)}], META))
    assert isinstance(made, BatchMover)
    assert [batch["x"].device for batch in made] == [META]
