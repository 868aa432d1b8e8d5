"""Devices that do not exist: tensors compute on the CPU, but those of two devices never in one operation."""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

#: A type of device that torch knows the name of and nothing else.
TYPE = "ipu"

#: Operations that take tensors of several devices: copies, and those that are indexed from the CPU.
_COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}


def _leaves(value):
    """Yield what arguments of an operation are made of; in short, as every operation passes here."""
    if isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def _mapped(change, value):
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(change, part) for part in value])
    if isinstance(value, dict):
        return {name: _mapped(change, part) for name, part in value.items()}
    return change(value)


class Pretended(torch.Tensor):
    """A tensor of the CPU, ``inner``, that says it is elsewhere."""

    @staticmethod
    def __new__(cls, inner, device):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )

    def __init__(self, inner, device):
        self.inner = inner

    def __repr__(self):
        return f"{self.inner!r} on {self.device}"

    def tolist(self):
        return self.inner.tolist()

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo):
        return Pretended(self.inner.clone(), self.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


class _InPython(TorchFunctionMode):
    """What torch does for a device before it dispatches anything."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(device)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Pretended):
            chosen = [t for t in _leaves(args[1]) if isinstance(t, torch.Tensor)]
            _require_one({args[0].device, *(t.device for t in chosen if t.device.type != "cpu")}, func)
            if func is torch.Tensor.__setitem__:
                values = [t for t in args[2:] if isinstance(t, torch.Tensor) and t.ndim]
                _require_one({args[0].device, *(t.device for t in values)}, func)
            found = func(*_mapped(_bare, args))
            return None if found is None else Pretended(found, args[0].device)
        if func in _PRODUCTS:
            return _compute(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            # Some methods look the device's driver up by themselves, first of all.
            if "not linked with support" not in str(error):
                raise
        return _compute(func, args, kwargs)


#: Made of operations that change the shape of their result in place, which is not noticed here.
_PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}


def _bare(value):
    return value.inner if isinstance(value, Pretended) else value


def _require_one(devices, func):
    if len(devices) > 1:
        raise RuntimeError(f"{func}: expected all tensors on one device, got {sorted(map(str, devices))}")


class PretendedDevices(TorchDispatchMode):
    """Within this mode, tensors can be made on such devices and moved between them."""

    def __enter__(self):
        self._python = _InPython()
        self._python.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._python.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def _compute(func, args, kwargs):
    tensors = [t for t in _leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    # As everywhere in torch, single numbers of the CPU go with all devices.
    devices = {t.device for t in tensors if isinstance(t, Pretended) or t.ndim}
    if func in _INDEXED:
        devices = {args[0].device, *(d for d in devices if d.type != "cpu")}
    if func not in _COPIES:
        _require_one(devices, func)
    home = args[0].device if func in _COPIES else next(iter(devices), torch.device("cpu"))
    if kwargs.get("device") is not None:
        home = torch.device(kwargs["device"])
        kwargs = {**kwargs, "device": "cpu"}
    wrappers = {id(t.inner): t for t in tensors if isinstance(t, Pretended)}

    def dressed(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in wrappers:  # changed in place
            return wrappers[id(value)]
        return Pretended(value, home) if home.type == TYPE else value

    found = func(*_mapped(_bare, args), **_mapped(_bare, kwargs))
    if func is torch.ops.aten._to_copy.default and any(found is _bare(t) for t in tensors):
        found = found.clone()
    return _mapped(dressed, found)


def pretend_on(module, device):
    """Move a module's weights and buffers there, in place."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                inner = weight.inner if isinstance(weight, Pretended) else weight.detach()
                part._parameters[name] = nn.Parameter(
                    Pretended(inner, torch.device(device)), requires_grad=False
                )
        for name, buffer in part._buffers.items():
            if buffer is not None:
                inner = buffer.inner if isinstance(buffer, Pretended) else buffer
                part._buffers[name] = Pretended(inner, torch.device(device))
    return module
