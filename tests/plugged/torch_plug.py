# SPDX-License-Identifier: Apache-2.0
"""A real plug-in device of torch, written in Python: `plug`, on torch's PrivateUse1 key.

Tensors of `plug` have storages without memory; what they hold lies in host storages beside them. Views are made by
torch on the device's own tensors, so that sizes, strides and offsets are the device's; every other operator runs on
host tensors of the same geometry. Importing this module registers the device, once for a process.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "plug"

# The Meta kernels of views only compute a geometry and keep everything else of the tensor that they are given.
_META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)
_hosts = {}  # address of a device storage to the host storage; replaced when the address is used again


def _to_host(thing):
    if isinstance(thing, torch.device) and thing.type == NAME:
        return torch.device("cpu")
    if not isinstance(thing, torch.Tensor) or thing.device.type != NAME:
        return thing
    storage = _hosts[thing.untyped_storage()._cdata]
    return torch.empty(0, dtype=thing.dtype).set_(storage, thing.storage_offset(), thing.shape, thing.stride())


def _to_device(thing):
    if not isinstance(thing, torch.Tensor):
        return thing
    made = torch._C._acc.create_empty_tensor(thing.shape, thing.dtype)
    _hosts[made.untyped_storage()._cdata] = thing.contiguous().untyped_storage()
    return made


def _kernel(op, *args, **kwargs):
    if op is torch.ops.aten._fused_sdp_choice.default:
        return 0  # torch's own fallback: the host has a fused attention, the device has none
    if any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns):
        return op.redispatch(_META, *args, **kwargs)
    leaves, structure = pytree.tree_flatten((args, kwargs))
    hosts = [_to_host(leaf) for leaf in leaves]
    host_args, host_kwargs = pytree.tree_unflatten(hosts, structure)
    if op is torch.ops.aten._copy_from.default:
        host_args[1].copy_(host_args[0])
        return args[1]
    # The packet, not the overload: numbers among the arguments may stand where the schema has a tensor.
    result = op.overloadpacket(*host_args, **host_kwargs)
    given = [(host, leaf) for host, leaf in zip(hosts, leaves, strict=True) if host is not leaf]
    for host, leaf in given:
        if isinstance(leaf, torch.Tensor) and leaf.shape != host.shape:  # an `out` that was resized
            leaf.data = _to_device(host)
    back = {id(host): leaf for host, leaf in given}
    return pytree.tree_map(lambda thing: back[id(thing)] if id(thing) in back else _to_device(thing), result)


class _Module:
    """What torch asks of `torch.plug`; the numbers are the host generator's."""

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def synchronize(self, device=None):
        pass

    def manual_seed_all(self, seed):
        torch.default_generator.manual_seed(seed)


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
_library = torch.library.Library("_", "IMPL")
_library.fallback(_kernel, "PrivateUse1")
