"""Two accelerators that are not there: torch devices that keep their values on the CPU, and are as strict as GPUs.

A tensor on `fake:0` and one on `fake:1` do not go together, nor with one on the CPU, as with real devices. The CPU's
kernels compute everything, so results are the CPU's to the bit. Importing this registers the device with torch.
"""

import contextlib
from typing import NamedTuple

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

NAME = "fake"
_COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
_WITH_PYTHON_ASIDE = ("_to_copy", "alias", "copy_", "detach", "empty.memory_format", "empty_strided", "lift_fresh")
_WITH_PYTHON_ASIDE += ("to.dtype_layout",)
"""What torch calls while it makes a tensor of a list: a fallback for all operations is not asked there."""


class _Hook(torch._C._acc.PrivateUse1Hooks):
    """Tells torch that nothing is to be chosen by itself: other tests run in this process."""

    def is_available(self):
        return False

    def has_primary_context(self, index):
        return True

    def is_built(self):
        return True


class _Module(backend_registration._DummyBackendModule):
    def is_available(self):
        return False

    def device_count(self):
        return 2


backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
DEVICES = (torch.device(NAME, 0), torch.device(NAME, 1))


class FakeTensor(torch.Tensor):
    """A tensor on a fake device; `values` is the CPU's tensor behind it."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values, device):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, values.size(), device=device, **layout)
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        if not all(issubclass(cls, one) for one in types):
            return NotImplemented  # ComfyUI's quantised tensors, which hold several of ours
        return _run(operation, args, kwargs or {})


def _run(operation, args, kwargs):
    """Runs an operation of torch on the values of its arguments; its results are where it would have made them."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd"):
        return operation.decompose(*args, **kwargs)
    flat, spec = pytree.tree_flatten((args, kwargs))
    given = [one for one in flat if isinstance(one, FakeTensor)]
    if operation._schema.name not in _COPIES:
        _check_together(operation, flat)
    device = kwargs.get("device") or next((one.device for one in flat if isinstance(one, torch.Tensor)), None)
    on_cpu = [one.values if isinstance(one, FakeTensor) else one for one in flat]
    on_cpu = [torch.device("cpu") if isinstance(one, torch.device) else one for one in on_cpu]
    args, kwargs = pytree.tree_unflatten(on_cpu, spec)
    same = {id(one.values): one for one in given}

    def placed(result):
        if not isinstance(result, torch.Tensor) or device is None:
            return result
        if id(result) in same:
            return same[id(result)]
        return FakeTensor(result, device) if torch.device(device).type == NAME else result

    return pytree.tree_map(placed, operation(*args, **kwargs))


def _check_together(operation, values):
    # As on GPUs, a single number may come from the CPU.
    tensors = [one for one in values if isinstance(one, torch.Tensor)]
    places = {str(one.device) for one in tensors if one.dim() or isinstance(one, FakeTensor)}
    if len(places) > 1:
        raise RuntimeError(
            f"{operation._schema.name}: tensors on {' and '.join(sorted(places))} found, on one expected"
        )


def _kernel(operation):
    return lambda *args, **kwargs: _run(operation, args, kwargs)


_fallback, _kernels = (torch.library.Library(name, "IMPL", "PrivateUse1") for name in ("_", "aten"))
_fallback.fallback(lambda operation, *args, **kwargs: _run(operation, args, kwargs))
for _name in _WITH_PYTHON_ASIDE:
    _base, _, _overload = _name.partition(".")
    _kernels.impl(_name, _kernel(getattr(getattr(torch.ops.aten, _base), _overload or "default")))


class Gpus(NamedTuple):
    """What ComfyUI is told of the two: the devices, and how many bytes of each are free."""

    devices: tuple
    free: dict


@contextlib.contextmanager
def as_gpus():
    """Lets ComfyUI take the two for all its GPUs, of 8 GiB each, and the first for the one that it starts on."""
    import comfy.model_management as mm
    import pytest

    gpus, of_cpu = Gpus(DEVICES, dict.fromkeys(DEVICES, 8 << 30)), torch.Generator

    def all_devices(exclude_current=False):
        return list(DEVICES[1:] if exclude_current else DEVICES)

    def bytes_of(device=None, torch_free_too=False, torch_total_too=False):
        found = gpus.free.get(DEVICES[0] if device is None else device, 8 << 30)
        return (found, found) if torch_free_too or torch_total_too else found

    def generator(device="cpu"):
        return of_cpu("cpu" if torch.device(device).type == NAME else device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", generator)
        for name in ("get_torch_device", "text_encoder_device", "vae_device"):
            patch.setattr(mm, name, lambda: DEVICES[0])
        for name in ("get_free_memory", "get_total_memory"):
            patch.setattr(mm, name, bytes_of)
        patch.setattr(mm, "get_all_torch_devices", all_devices, raising=False)
        patch.setattr(mm, "vram_state", mm.VRAMState.NORMAL_VRAM)
        yield gpus
        gpus.free.clear()
        mm.unload_all_models()
