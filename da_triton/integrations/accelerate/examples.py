"""Records the inputs of a model's layers when the model runs on an example."""

from typing import Any

import torch
from torch import Tensor, nn

from .verify import Call, seeded


def calls_in(
    model: nn.Module, layers: list[nn.Module], example: Any
) -> dict[nn.Module, list[Call]]:
    """Calls of each layer when the model runs on the example, one of every form.

    Parameters, buffers, modes and generators are afterwards as before.
    """
    calls: dict[nn.Module, list[Call]] = {}
    if example is None or not layers:
        return calls
    forms = set()

    def mask(module, args, kwargs):
        def form(x):
            return tuple(x.shape[1:]) if isinstance(x, Tensor) else repr(x)

        key = (module, *map(form, args), *((name, form(x)) for name, x in kwargs.items()))
        if key not in forms:
            forms.add(key)
            call = Call(args, kwargs).of(Tensor.detach, every=True)
            calls.setdefault(module, []).append(call)

    modes = {module: module.training for module in model.modules()}
    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    hooks = [layer.register_forward_pre_hook(mask, with_kwargs=True) for layer in layers]
    named = example if isinstance(example, dict) else {}
    args = example if isinstance(example, tuple) else () if named else (example,)
    try:
        model.eval()
        with torch.no_grad(), seeded(devices):
            model(*args, **named)
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, training in modes.items():
            if module.training != training:  # train() may do more than set a flag
                module.train(training)
    return calls
