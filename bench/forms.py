"""The forms of a case by their names, and the call of one that is measured."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nystromgan import _backend
from nystromgan.bench import draw
from nystromgan.bench.case import BACKWARD, BY, COMPILED, FORWARD, OURS, TUNED, Case, Form, Inputs, Peer, Shape


def forms_of(case: Case, compiled: bool) -> list[str]:
    """The names of ours and of the peers, each compiled one after its eager one."""
    names = [OURS]
    for name, peer in case.peers.items():
        names += [name] if compiled or not peer.needs_compile else []
        if compiled and case.compiled_in_full:
            names += ([name + COMPILED] if peer.compiled else []) + ([name + TUNED] if peer.tuned else [])
    return names


def by_backend(case: Case, device: str) -> list[str]:
    """Ours by each GPU backend, where there is a choice; OURS is the first of them."""
    able = [name for name in _backend.IMPLEMENTED.get(case.op, ()) if name in ("cuda", "triton")]
    able = [name for name in able if device == "cuda" and not _backend.unsupported_reasons(case.op, name, [])]
    return [BY + name for name in able] if len(able) > 1 else []


def eager_name(form: str) -> str:
    return form.removesuffix(COMPILED).removesuffix(TUNED)


def peer_of(case: Case, form: str) -> Peer | None:
    """The peer that a form is of; None for ours."""
    return None if form == OURS or form.startswith(BY) else case.peers[eager_name(form)]


def other_function(case: Case, form: str) -> bool:
    peer = peer_of(case, form)
    return peer is not None and peer.definition is not None


def compiles(case: Case, form: str) -> bool:
    peer = peer_of(case, form)
    return form.endswith((COMPILED, TUNED)) or (peer is not None and peer.needs_compile)


def function_of(case: Case, form: str, backend: str = "auto") -> Form:
    """The form by its name, with state of its own."""
    peer = peer_of(case, form)
    if peer is None:
        return case.ours(form.removeprefix(BY) if form.startswith(BY) else backend)
    made = peer.make()
    if form.endswith(COMPILED):
        return torch.compile(made, dynamic=False)
    if form.endswith(TUNED):
        # Without torch.compile's own CUDA graphs, which no other form's plain call has: a graph of every form's call is
        # captured and timed by the clock, and within it theirs would only add copies of the inputs.
        return torch.compile(made, dynamic=False, mode="max-autotune-no-cudagraphs")
    return made


def prepared(case: Case, form: str, mode: str, device: str, shape: Shape | None = None) -> Callable[[], Any]:
    """The call to measure on fresh inputs: without gradients for a forward; a backward alone runs on a kept graph."""
    return call_of(case, function_of(case, form), case.make(device, shape or case.shape, 0), mode)


def call_of(case: Case, form: Form, inputs: Inputs, mode: str) -> Callable[[], Any]:
    if mode == FORWARD and not case.training:
        return torch.no_grad()(lambda: form(**inputs))
    # An optimizer writes to its tensors; other forms are to find theirs as they were.
    inputs = inputs if case.optimizer is None else {name: x.clone() for name, x in inputs.items()}
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    if mode == FORWARD:
        return lambda: form(**leaves)
    # With gradients, as it will be called: torch.compile would otherwise compile twice.
    directions = [direction(x.detach()) for x in as_list(form(**leaves))]
    tensors = list(leaves.values())
    if mode == BACKWARD:
        outputs = as_list(form(**leaves))
        return lambda: torch.autograd.grad(outputs, tensors, directions, retain_graph=True, materialize_grads=True)
    if case.optimizer is not None:
        return _step(
            lambda: torch.autograd.grad(as_list(form(**leaves)), tensors, directions, materialize_grads=True),
            tensors,
            case,
        )
    return lambda: torch.autograd.grad(as_list(form(**leaves)), tensors, directions, materialize_grads=True)


def _step(gradients: Callable[[], Sequence[Tensor]], tensors: list[Tensor], case: Case) -> Callable[[], None]:
    """Gradients, and the optimizer's step along them."""
    assert case.optimizer is not None
    optimizer = case.optimizer(tensors)

    def step() -> None:
        for tensor, gradient in zip(tensors, gradients(), strict=True):
            tensor.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return step


def as_list(output: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def direction(output: Tensor) -> Tensor:
    """A fixed direction; every head of every sample has the same, so that a part of the output has that part of it."""
    shape = output.shape if output.ndim < 4 else (1, 1, *output.shape[2:])
    direction = draw.normal(*shape, dtype=torch.bfloat16, device=output.device.type, seed=9)
    return direction.to(output).expand_as(output).contiguous()
