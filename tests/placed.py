"""Models whose layers lie on several devices, placed by hand: inputs are moved by hooks."""

import torch
from torch.utils._pytree import tree_map


def place(model, devices, put=lambda module, device: module.to(device)):
    """Spread a model's layers over devices in turn, in place; all else is on the first one.

    ``put`` moves a module there. With real devices, this is what accelerate's ``dispatch_model`` does.
    """
    put(model, devices[0])
    layers = model.model.layers
    for index, layer in enumerate(layers):
        _receive(put(layer, devices[index % len(devices)]), devices[index % len(devices)])
    for part in model.model.children():
        if part is not layers:
            _receive(part, devices[0])
    return model


def _receive(module, device):
    def move(module, args, kwargs):
        def there(value):
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return tree_map(there, args), {name: tree_map(there, value) for name, value in kwargs.items()}

    module.register_forward_pre_hook(move, with_kwargs=True)
