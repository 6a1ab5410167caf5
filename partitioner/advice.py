"""What to change in a module so that capture can open it: advice by reason."""

from __future__ import annotations

import re

_INPLACE_STATE = "keep it in a buffer (self.register_buffer) that is changed in place, or change it outside of forward"
_TORCH_RANDOM = "draw from torch (torch.rand, torch.randint), whose random numbers a graph keeps"
_SMALL_MODULE = "give these lines a function of their own, from tensors to tensors, so that only it is kept whole"
_ANY_BATCH = "write it over the whole batch at once, without a Python loop or list whose length is the batch size"
_GRADIENTS = "use a torch.autograd.Function, whose own backward is kept, or do it outside of the model"

# The first pattern that is found in the reason decides.
_ADVICE: tuple[tuple[str, str], ...] = (
    (r"^asked for", ""),
    (r"takes len\(\)", "write x.shape[0] instead of len(x)"),
    (r"branches on a tensor's data", f"choose with torch.where instead of if; or {_SMALL_MODULE}"),
    (r"branches on the batch size", f"do the same for every batch size; or {_SMALL_MODULE}"),
    (r"branches on a number that an opaque", "let that module return a tensor, and choose with torch.where"),
    (r"reads a number out of a tensor", "keep the number in the tensor: no .item(), int() or float() on the way"),
    (r"reads (a shape that depends on data|a tensor's|the data)", f"work on the tensor itself; or {_SMALL_MODULE}"),
    (r"changes its own attribute", _INPLACE_STATE),
    (r"converts or moves a module", "convert the model once, before it is captured"),
    (r"an attribute of a module", "hand the value to the module as an argument"),
    (r"hook changes something", "let the hook return what it found, or remove it before the model is captured"),
    (r"has backward hooks", "remove the module's backward hooks before the model is captured"),
    (r"Python's random|from numpy|generator of its own", _TORCH_RANDOM),
    (r"seeds torch's random", "seed once before the training loop instead of in forward"),
    (r"registers a hook|keeps a gradient", _GRADIENTS),
    (r"gradients of its own|backward of its own", _GRADIENTS),
    (r"changes an argument", "copy the argument before changing it, or return what is new as part of the result"),
    (r"(calls|arguments|values|structure) for another size", _ANY_BATCH),
    (r"constant that changes from run to run", "compute the number from tensor.shape, or keep it in a tensor"),
    (r"at every call", "make the object once, in __init__, and use it in forward"),
    (r"torch\.inference_mode", "use torch.no_grad() there"),
    (r"its own settings", "choose the settings once, before training, instead of inside forward"),
    (r"returned .* which may differ", "let the opaque module return a tensor instead of a Python value"),
    (r"object with tensors inside", "pass the tensors themselves, or put them into a tuple, dict or dataclass"),
    (r"made in a way that cannot be seen", f"make the tensor with torch functions; or {_SMALL_MODULE}"),
    (r"data as text", "leave the tensor out of the text: write its shape, or print it outside of forward"),
    (r"copy\.deepcopy", "use tensor.clone()"),
    (r"assigns a tensor's|replaces a tensor's storage", "compute a new tensor, or write with tensor.copy_(...)"),
    (r"resizes a tensor", "make a new tensor of the size that is needed"),
    (r"pickles a tensor|shared memory", "do it outside of forward"),
    (r"maps a function over a dimension", "write the batched computation out"),
    (r"returns nothing that a graph|which is not a tensor", _SMALL_MODULE),
    (r"meta tensors", "capture the model with real parameters and real example inputs"),
    (r"computed something else", "look for state that forward keeps outside of the model (a global, a closure)"),
)  # fmt: skip


def advice(reason: str) -> str:
    """Say what would let the module be opened; empty where nothing is to be changed."""
    return next((text for pattern, text in _ADVICE if re.search(pattern, reason)), _SMALL_MODULE)


def is_known(reason: str) -> bool:
    """Say whether there is advice for this very reason."""
    return any(re.search(pattern, reason) for pattern, _ in _ADVICE)
