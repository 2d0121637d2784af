"""A device that computes on the CPU and is as strict as a GPU: "away", made with PyTorch's hooks for other backends.

`.numpy()`, `np.asarray`, operators on tensors of two devices, and CPU generators raise as they do on a GPU; the device
has random numbers of its own, and autocast of its convolutions and matrix products. `register` cannot be undone.

Not pretended are pinned memory, streams, kernels that round otherwise, and what asks for "cuda" by name.
"""

import types
from functools import partial, partialmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "away"
CAST = ("conv2d", "conv_transpose2d.input", "linear", "matmul")  # that autocast computes in a lower precision
MOVES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}  # may have tensors of two devices
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # by CPU tensors too

draws = torch.Generator()
operators, rest = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")


class Away(Tensor):
    """A tensor of that device; `here` has its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "Away":
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        made = Tensor._make_wrapper_subclass(cls, here.size(), **layout, device=f"{NAME}:0")
        made.here = here
        return made

    def __repr__(self) -> str:
        return f"Away({self.here})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.here.__reduce_ex__(protocol)  # read with map_location="cpu", it is there

    def numpy(self, *arguments: Any, **options: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy it first")

    def tolist(self) -> Any:
        return self.here.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})


def computed(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operator on the values, after a look at where its tensors are."""
    name, schema = function._schema.name, function._schema
    leaves = [leaf for value in (*args, *kwargs.values()) for leaf in (value if type(value) is list else [value])]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    goal = kwargs.get("device")
    away = any(isinstance(tensor, Away) for tensor in tensors) if goal is None else torch.device(goal).type == NAME
    joins = name in ("aten::cat", "aten::stack")
    strangers = [
        tensor
        for tensor in tensors
        if not isinstance(tensor, Away) and (tensor.dim() or joins or (schema.is_mutable and tensor is args[0]))
    ]
    if strangers and len(strangers) < len(tensors) and name not in MOVES:
        places = {id(index) for index in args[1]} if name in INDEXING and isinstance(args[0], Away) else set()
        if not all(id(tensor) in places for tensor in strangers):
            found = ", ".join(f"{list(t.shape)} on {t.device.type}" for t in tensors)
            raise RuntimeError(f"{name}: expected all tensors on the same device, found {found}")
    if away and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"{name}: expected a generator of {NAME}, found one of the CPU")
    values, options = _here(args), {key: _here(value) for key, value in kwargs.items()}
    if goal is not None:
        options["device"] = "cpu" if away else goal
    options.pop("pin_memory", None)
    if name == "aten::_copy_from":
        values[1].copy_(values[0])
        return args[1]
    if away and torch.Tag.nondeterministic_seeded in function.tags:
        kept = torch.get_rng_state()
        torch.set_rng_state(draws.get_state())
        result = function(*values, **options)
        draws.set_state(torch.get_rng_state())
        torch.set_rng_state(kept)
    else:
        result = function(*values, **options)
    if schema.is_mutable:  # what is written in place is given back as it came
        own = {id(_here(tensor)): tensor for tensor in tensors}
        return _mapped(lambda tensor: own[id(tensor)], result)
    return _mapped(Away, result) if away else result


def _here(value: Any) -> Any:
    return _mapped(lambda tensor: tensor.here if isinstance(tensor, Away) else tensor, value)


def _mapped(change: Any, value: Any) -> Any:
    """A value with its tensors changed, as operators take and return them: alone, or in lists."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_mapped(change, part) for part in value) if type(value) in (list, tuple) else value


def register() -> None:
    """Make the device known to this process, for good."""
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.device_count, module.current_device, module.is_available = lambda: 1, lambda: 0, lambda: True
    module._is_in_bad_fork, module.manual_seed_all = lambda: False, draws.manual_seed
    module.get_rng_state = lambda device=NAME: draws.get_state()
    module.set_rng_state = lambda state, device=NAME: draws.set_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    for qualified in torch._C._dispatch_get_all_op_names():
        name, _, overload = qualified.removeprefix("aten::").partition(".")
        if not qualified.startswith("aten::"):
            continue
        function = getattr(getattr(torch.ops.aten, name), overload or "default")
        kinds = [str(argument.type) for argument in function._schema.arguments]
        makes = "Optional[Device]" in kinds or "Device" in kinds
        if name == "_copy_from" or (makes and not any("Tensor" in kind for kind in kinds)):
            operators.impl(qualified.removeprefix("aten::"), partial(_on_values, function), "PrivateUse1")
    for name in CAST:
        function = getattr(torch.ops.aten, name.partition(".")[0])
        operators.impl(name, partial(_cast, function), "AutocastPrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    torch.utils.swap_tensors, nn.Module._apply = _swap, partialmethod(_move, nn.Module._apply)


def _move(module: nn.Module, apply: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """Move a module, whose parameters stay the same objects, as they do on a GPU."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return apply(module, *args, **kwargs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _swap(a: Any, b: Any) -> None:
    """What each of two is, even where a graph of an earlier pass still knows one, which PyTorch's own refuses."""
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    torch._C._swap_tensor_impl(a, b)


def _on_values(function: Any, *args: Any, **kwargs: Any) -> Any:
    return computed(function, args, kwargs)


def _cast(function: Any, *args: Any, **kwargs: Any) -> Any:
    lower = torch.get_autocast_dtype(NAME)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return function(*_mapped(lambda tensor: tensor.to(lower), args), **kwargs)
