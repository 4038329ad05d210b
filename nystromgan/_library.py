"""The torch.library ops of the project: how one is defined, and how its second derivative is made."""

import contextlib
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("nystromgan", "FRAGMENT")


def constant_when_compiled(function: Callable) -> Callable:
    """Lets torch.compile evaluate a function of plain Python values once, instead of tracing into it.

    Sets what torch.compiler.assume_constant_result sets; that one imports dynamo and triton, 1.2 s of every import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on; float64 stays, as under torch's own ops."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Switches autocast off where it is on; where it is not, to enter and leave its context costs 17 us for nothing."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def define(schema: str, implementation: Callable, fake: Callable) -> None:
    """Defines the op of `schema`, implemented in Python for every device; `fake` gives shapes and dtypes only."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nystromgan::{name}", fake, lib=LIBRARY)


def define_native(schema: str) -> None:
    """Declares the op of `schema`, which the native libraries implement for the dispatch keys of their devices."""
    LIBRARY.define(schema)


def kernel(op: str, name: str, backend: str) -> Callable:
    """What runs `name`, an op of folder `op`, on `backend`; every backend takes the arguments of the native schema."""
    if backend == "triton":
        return getattr(importlib.import_module(f"nystromgan.ops.{op}.triton"), name)
    return getattr(torch.ops.nystromgan, f"{name}_native")


def register_autograd(name: str, setup_context: Callable, backward: Callable) -> None:
    """Gives the op `name`, whose arguments have no defaults, its derivative.

    What torch.library.register_autograd does, but for looking up defaults and for trees: the first goes through the
    schema once for every pair of arguments, 0.15 ms a call for an op of 19, half of what a small attention took; the
    second took 0.1 ms for every call of an op of lists.
    """
    op = getattr(torch.ops.nystromgan, name).default

    def below(keyset: torch._C.DispatchKeySet, inputs: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    def below_function(keyset: torch._C.DispatchKeySet, inputs: Sequence[Any]) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return below(keyset, inputs)
        with torch.enable_grad():  # of outer transforms, for which a Function's forward has switched it off too
            return below(keyset, inputs)

    has_lists = any(argument.type.isSubtypeOf(torch.ListType.ofTensors()) for argument in op._schema.arguments)
    apply = (_apply_to_lists if has_lists else _apply)(below_function, setup_context, backward)

    def autograd(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return apply(keyset, inputs)
        return below(keyset, inputs)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


def _apply(below: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """What calls an op and records its derivative."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args
            output = below(keyset, inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            result = backward(ctx, *grads)
            return (*result, None) if isinstance(result, tuple) else (result, None)

    apply = _apply_of(Differentiable)
    return lambda keyset, inputs: apply(*inputs, keyset)


def _apply_of(function: type[torch.autograd.Function]) -> Callable:
    """Its `apply`, also under torch.func.

    A transform has come down to its own level when an op's kernel runs, and records there as autograd does. The public
    `apply` would start at the top again, and refuses a function without `setup_context`.
    """
    record = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        from torch._functorch.utils import enable_single_level_autograd_function  # private: only where it is needed

        with enable_single_level_autograd_function():
            return record(*args)

    return apply


def _apply_to_lists(below: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """`_apply` for an op of lists of tensors, in which an autograd.Function sees no gradient: they go one by one."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: torch._C.DispatchKeySet, sizes: list, *flat: Any) -> Any:
            inputs = _grouped(flat, sizes)
            output = below(keyset, inputs)
            setup_context(ctx, inputs, output)
            ctx.sizes = tuple(sizes)
            # the caller's list has the sizes of the results from here on
            results, sizes[:] = _flattened(output if isinstance(output, tuple) else (output,))
            ctx.result_sizes = tuple(sizes)
            return tuple(results)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            result = backward(ctx, *_grouped(grads, ctx.result_sizes))
            flat: list[Any] = []
            for grad, size in zip(result if isinstance(result, tuple) else (result,), ctx.sizes, strict=True):
                flat.extend([grad] if size is None else [None] * size if grad is None else grad)
            return None, None, *flat

    record = _apply_of(Differentiable)

    def apply(keyset: torch._C.DispatchKeySet, inputs: Sequence[Any]) -> Any:
        flat, sizes = _flattened(inputs)
        results = record(keyset, sizes, *flat)
        grouped = _grouped(results, sizes)
        return grouped[0] if len(grouped) == 1 else tuple(grouped)

    return apply


def _flattened(values: Sequence[Any]) -> tuple[list[Any], list[int | None]]:
    """Values with the members of lists in their places, and the length of each list, None of what is none."""
    sizes = [len(value) if isinstance(value, (list, tuple)) else None for value in values]
    flat: list[Any] = []
    for value, size in zip(values, sizes, strict=True):
        flat.extend([value] if size is None else value)
    return flat, sizes


def _grouped(flat: Sequence[Any], sizes: Sequence[int | None]) -> list[Any]:
    """The inverse of `_flattened`."""
    rest = iter(flat)
    return [next(rest) if size is None else list(itertools.islice(rest, size)) for size in sizes]


def vjp_of_vjp(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    grad_output: Tensor,
    grad_grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The derivative of a backward pass, from the differentiable definition of its forward pass.

    For g = vjp(function, inputs)(grad_output), gives the gradients of sum(g * grad_grads) for grad_output and for
    inputs. The result is differentiable again when grad mode is on, so the order of differentiation has no end.
    `inputs` and `grad_grads` match one to one; None stands for an absent input or a gradient that nobody asked for.
    """
    create_graph = torch.is_grad_enabled()

    def alias(tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor) if tensor.requires_grad and create_graph else tensor.detach().requires_grad_()

    with torch.enable_grad():
        present = [i for i, x in enumerate(inputs) if x is not None and grad_grads[i] is not None]
        variables: list[Any] = [None if x is None else alias(x) for x in inputs]
        grad_output = alias(grad_output)
        tracked = [x for x in variables if x is not None]
        grads = torch.autograd.grad(
            function(*variables),
            [variables[i] for i in present],
            grad_output,
            create_graph=True,
            materialize_grads=True,
        )
        weights = [grad_grads[i].to(g.dtype) for i, g in zip(present, grads, strict=True)]  # type: ignore[union-attr]
        pairs = [(g, w) for g, w in zip(grads, weights, strict=True) if g.requires_grad]
        if not pairs:
            return None, [None] * len(inputs)
        seconds = torch.autograd.grad(
            [g for g, _ in pairs],
            [grad_output, *tracked],
            [w for _, w in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    rest = iter(seconds[1:])
    return seconds[0], [None if x is None else next(rest) for x in variables]
