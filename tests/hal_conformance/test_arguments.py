# SPDX-License-Identifier: Apache-2.0
"""An operator that writes into what it is given is found out, whoever made it and whenever it does."""

import pytest
import torch

from hal_conformance import arguments
from hal_conformance.case import Malformed


class Ops:
    """An operator that does something to its first argument."""

    name = "no operator"

    def __init__(self, does, then=None):
        self.does, self.then = does, then

    def op(self, x, others=(), *, named=None):
        y = x * 2
        self.does(x, others, named)
        if self.then:
            y.register_hook(lambda dy: self.then(x, dy))
        return y


def nothing(*_):
    return None


def said(ops, run, compared=()):
    with arguments.watched(ops, compared) as watched:
        run(watched)
    try:
        watched.check()
    except Malformed as error:
        return str(error)
    return ""


WRITES = {
    "in place": lambda x, *_: x.zero_(),
    "unseen by autograd": lambda x, *_: x.data.fill_(7.0),
    "the same bits": lambda x, *_: x.copy_(x.clone()),
    "another zero": lambda x, *_: x.data.neg_(),
    "beside it": lambda x, *_: x.data.as_strided((1,), (1,), 0).fill_(1.0),
    "another storage": lambda x, *_: setattr(x, "data", x.data.clone()),
    "no storage": lambda x, *_: x.untyped_storage().resize_(0),
    "another shape": lambda x, *_: x.t_(),
}


@pytest.mark.parametrize("how", WRITES)
def test_every_way_to_write_into_an_argument_is_seen(how):
    x = torch.zeros(4, 6)[1:, 2:]
    assert said(Ops(WRITES[how]), lambda ops: ops.op(x)) == "op wrote into its argument 0"


def test_what_lies_in_lists_tuples_and_keywords_is_looked_at_and_named():
    one, other = torch.ones(3), torch.ones(3)
    assert said(Ops(lambda x, o, n: o[1][0].data.zero_()), lambda ops: ops.op(one, (one, [other]))) == (
        "op wrote into its argument 1.1.0"
    )
    assert said(Ops(lambda x, o, n: n.data.zero_()), lambda ops: ops.op(one, named=torch.ones(2))) == (
        "op wrote into its argument 1"
    )


def test_honest_operators_are_let_alone_whatever_they_are_given():
    odd = [torch.full((3,), torch.nan), torch.ones(0), torch.ones(()), torch.ones(4)[::2], torch.ones(2).bfloat16(),
           torch.ones(3, dtype=torch.bool), torch.ones(2, 3).expand(5, 2, 3), None, 3, "x"]  # fmt: skip
    assert said(Ops(nothing), lambda ops: ops.op(torch.ones(3, requires_grad=True), odd)) == ""
    with arguments.watched(Ops(nothing), ()) as watched:
        assert watched.name == "no operator"
        with pytest.raises(AttributeError):
            _ = watched.none


def test_what_the_case_writes_between_two_calls_is_its_own_affair():
    def run(ops):
        x = torch.ones(3)
        ops.op(x)
        x.add_(1)
        ops.op(x)

    assert said(Ops(nothing), run) == ""


def test_the_backward_pass_may_write_no_more_than_the_forward_pass():
    def run(ops, again=False):
        x, dy = torch.ones(4)[::2].requires_grad_(), torch.ones(4)[::2]
        y = ops.op(x)
        for _ in range(1 + again):
            with arguments.backward_pass([dy], again=again):
                y.backward(dy, retain_graph=again)

    assert said(Ops(nothing, lambda x, dy: None), run) == ""
    assert said(Ops(nothing, lambda x, dy: (x.data.zero_(), None)[1]), run) == (
        "in the backward pass, op wrote into its argument 0"
    )
    assert said(Ops(nothing, lambda x, dy: (dy.data.zero_(), None)[1]), run) == (
        "the backward pass wrote into its upstream gradient 0"
    )
    calls = iter((None, 0))
    second = Ops(nothing, lambda x, dy: (x.data.mul_(3.0) if next(calls) == 0 else None, None)[1])
    assert said(second, lambda ops: run(ops, again=True)) == "in the backward pass, op wrote into its argument 0"


class Buffers:
    """Operators whose results lie in the first half of a buffer."""

    def make(self):
        return torch.zeros(4)[:2]

    def use(self, x, at):
        x.as_strided((1,), (1,), at).fill_(5.0)
        return x * 2


@pytest.mark.parametrize(("at", "words"), [(1, "use wrote into its argument 0"), (3, "")])
def test_of_what_operators_returned_the_elements_are_looked_at_and_not_what_lies_beside(at, words):
    assert said(Buffers(), lambda ops: ops.use(ops.make(), at)) == words
    assert said(Buffers(), lambda ops: ops.use(torch.zeros(4)[:2], at)) == "use wrote into its argument 0"


def test_results_that_are_promised_as_new_lie_in_no_argument():
    class Clips:
        def clip_grad_norm(self, gradients, max_norm):
            return [gradients[0].view(-1), gradients[1].clone()], torch.ones(())

        def rms_norm(self, x):
            return x

    one, two = torch.ones(2, 3), torch.ones(3)
    assert "clip_grad_norm returned the memory" in said(Clips(), lambda ops: ops.clip_grad_norm([one, two], 1.0))
    assert not said(Clips(), lambda ops: ops.clip_grad_norm([torch.ones(0), two], 1.0))
    assert not said(Clips(), lambda ops: ops.rms_norm(one))


def test_a_write_that_autograd_refuses_is_named_before_autograd_is():
    class Writes:
        def combine(self, x):
            y = x.square()
            x.data.zero_()
            torch._C._autograd._unsafe_set_version_counter((x,), (x._version + 1,))
            return y

    def run(ops):
        x = torch.ones(3, requires_grad=True) * 2
        y = ops.combine(x)
        with arguments.backward_pass([torch.ones(3)]):
            y.backward(torch.ones(3))

    with pytest.raises(Malformed, match="combine wrote into its argument 0"):
        said(Writes(), run)


def test_other_errors_of_a_backward_pass_are_what_they_are():
    def run(ops):
        with arguments.backward_pass():
            raise RuntimeError("of somebody else's")

    with pytest.raises(RuntimeError, match="of somebody else's"):
        said(Ops(nothing), run)
