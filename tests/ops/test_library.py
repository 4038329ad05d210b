"""The torch.library contract of every differentiable op: opcheck, higher derivatives, compile, export, autocast."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nystromgan import iterative_pinv, nystrom_attention, spatiotemporal_attention
from nystromgan.testing import (
    assert_same,
    attention_inputs,
    backends_of,
    device_of,
    finishing,
    map_inputs,
    native_backends_of,
    normal,
    padding_mask,
    relative_error,
)

OPS = torch.ops.nystromgan


def given(count: int = 5, **where: object) -> dict[str, Tensor]:
    landmarks = {name: normal(2, 2, count, 8, seed=9 + i, **where) for i, name in enumerate(("query", "key"))}  # type: ignore[arg-type]
    return {f"{name}_landmarks": x for name, x in landmarks.items()}


def tokens(**where: object) -> dict[str, Tensor]:
    return attention_inputs(2, 2, 30, head_dim=8, value_dim=6, **where)  # type: ignore[arg-type]


# name: (public function, its tensors on a device and in a dtype, its other arguments)
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., dict[str, Tensor]], dict[str, object]]] = {
    "pinv": (iterative_pinv, lambda **w: {"matrix": normal(3, 6, 6, **w)}, {}),
    "pinv_global": (iterative_pinv, lambda **w: {"matrix": normal(3, 6, 6, **w)}, {"init": "global_max"}),
    "segments": (nystrom_attention, tokens, {"num_landmarks": 5}),
    "grid": (nystrom_attention, tokens, {"num_landmarks": 4, "grid": (5, 6)}),
    "clustered": (nystrom_attention, tokens, {"num_landmarks": 5, "cluster_iterations": 2}),
    "given": (nystrom_attention, lambda **w: tokens(**w) | given(**w), {}),
    "padded": (
        nystrom_attention,
        lambda device, dtype=torch.float32: (
            tokens(device=device, dtype=dtype)
            | {"key_padding_mask": padding_mask([23, 3], 30, scattered=True, device=device)}
        ),
        {"num_landmarks": 5},
    ),
    "exact": (nystrom_attention, tokens, {"num_landmarks": 30}),
    "conv": (
        nystrom_attention,
        lambda **w: tokens(**w) | {"conv_weight": normal(2, 3, **w)},
        {"num_landmarks": 5, "pinv_init": "global_max"},
    ),
    "finished": (
        nystrom_attention,
        lambda **w: tokens(**w) | finishing(tokens(**w)),
        {"num_landmarks": 5},
    ),
    "maps": (spatiotemporal_attention, lambda **w: map_inputs(2, 6, (4, 5), (3, 2), 4, **w), {"num_heads": 2}),
    "block": (
        spatiotemporal_attention,
        lambda **w: (
            map_inputs(2, 6, (4, 5), None, 4, **w)
            | {"gamma": normal(1, **w), "residual": normal(2, 4, 4, 5, seed=7, **w)}
        ),
        {},
    ),
}
NATIVE = [(name, backend) for name, (op, *_) in CASES.items() for backend in native_backends_of(op.__name__)]
ANY = [(name, backend) for name, (op, *_) in CASES.items() for backend in backends_of(op.__name__)]
on_native_backends = pytest.mark.parametrize(("case", "backend"), NATIVE)
on_every_backend = pytest.mark.parametrize(("case", "backend"), ANY)


def make(case: str, backend: str, dtype: torch.dtype = torch.float32) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The case as a function of its tensors alone, and the tensors, differentiable ones as leaves."""
    function, inputs, options = CASES[case]
    tensors = inputs(device=device_of(backend), dtype=dtype)
    leaves = [x.requires_grad_(x.is_floating_point()) for x in tensors.values()]
    return lambda *args: function(**dict(zip(tensors, args, strict=True)), **options, backend=backend), leaves


def differentiable(leaves: list[Tensor]) -> list[Tensor]:
    return [x for x in leaves if x.requires_grad]


def _with(tensors: list[Tensor], numbers: tuple[int, ...], others: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors, with others in the places of those numbers."""
    replaced = dict(zip(numbers, others, strict=True))
    return [replaced.get(i, x) for i, x in enumerate(tensors)]


class TestDerivatives:
    @pytest.mark.parametrize("case", CASES)
    def test_definition_has_first_and_second(self, case: str) -> None:
        function, leaves = make(case, "reference", torch.float64)
        torch.autograd.gradcheck(function, leaves, fast_mode=True)
        torch.autograd.gradgradcheck(function, leaves, fast_mode=True)

    @on_native_backends
    def test_gradient_penalty_trains_as_in_float64(self, case: str, backend: str) -> None:
        """The second derivative, through every input, and with the first one in the loss as in R1 and WGAN-GP."""

        def gradients(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
            function, leaves = make(case, backend, dtype)
            inputs = differentiable(leaves)
            output = function(*leaves)
            direction = normal(*output.shape, dtype=torch.float64, seed=77).to(output)
            first = torch.autograd.grad(output, inputs, direction, create_graph=True)
            penalty = sum(grad.square().sum() for grad in first) + output.square().sum()
            return torch.autograd.grad(penalty, inputs)

        for grad, expected in zip(
            gradients(backend, torch.float32), gradients("reference", torch.float64), strict=True
        ):
            assert relative_error(grad, expected) < 1e-4

    @on_native_backends
    def test_third_derivative(self, case: str, backend: str) -> None:
        def third(backend: str, dtype: torch.dtype) -> Tensor:
            function, leaves = make(case, backend, dtype)
            grad = function(*leaves).pow(2).sum()
            for order in range(3):
                (grad,) = torch.autograd.grad(grad, leaves[0], create_graph=order < 2)
                grad = grad.pow(2).sum() if order < 2 else grad
            return grad

        assert relative_error(third(backend, torch.float32), third("reference", torch.float64)) < 1e-3

    @on_native_backends
    def test_transforms_of_torch_func_give_the_same(self, case: str, backend: str) -> None:
        """grad, of itself too, and vjp. A custom op of torch.library has none of them."""
        function, leaves = make(case, backend)
        numbers = tuple(i for i, x in enumerate(leaves) if x.requires_grad)
        tensors = [x.detach() for x in leaves]

        def loss(*args: Tensor) -> Tensor:
            return function(*args).square().sum()

        def penalty(*args: Tensor) -> Tensor:
            return sum((g.square().sum() for g in torch.func.grad(loss, numbers)(*args)), torch.zeros(()))

        inputs = differentiable(leaves)
        firsts = torch.autograd.grad(loss(*leaves), inputs, create_graph=True)
        seconds = torch.autograd.grad(sum(g.square().sum() for g in firsts), inputs)
        assert all(map(torch.equal, torch.func.grad(loss, numbers)(*tensors), firsts))
        _, pull = torch.func.vjp(lambda *args: loss(*_with(tensors, numbers, args)), *(tensors[i] for i in numbers))
        assert all(map(torch.equal, pull(torch.ones((), device=device_of(backend))), firsts))
        for grads in (torch.func.grad(penalty, numbers)(*tensors), torch.autograd.grad(penalty(*leaves), inputs)):
            for grad, expected in zip(grads, seconds, strict=True):
                torch.testing.assert_close(grad, expected)

    @on_native_backends
    def test_no_grad_within_a_transform_is_kept(self, case: str, backend: str) -> None:
        function, leaves = make(case, backend)

        def loss(first: Tensor) -> Tensor:
            with torch.no_grad():
                constant = function(first, *(x.detach() for x in leaves[1:])).sum()
            return constant * first.sum()

        (expected,) = torch.autograd.grad(loss(leaves[0]), leaves[:1])
        assert torch.equal(torch.func.grad(loss)(leaves[0].detach()), expected)
        assert torch.equal(torch.func.grad(loss)(leaves[0]), expected)

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    @pytest.mark.parametrize("case", ["segments", "conv", "block"])
    def test_gradients_of_each_sample_by_vmap(self, case: str) -> None:
        function, leaves = make(case, "auto")
        tensors = [x.detach() for x in leaves]
        shared = [x.shape[0] != tensors[0].shape[0] or x.ndim < 3 for x in tensors]

        def loss(*sample: Tensor) -> Tensor:
            return function(*(x if one else x[None] for x, one in zip(sample, shared, strict=True))).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), in_dims=tuple(None if one else 0 for one in shared))(*tensors)
        for i, grad in enumerate(each):
            alone = torch.func.grad(loss)(*(x if one else x[i] for x, one in zip(tensors, shared, strict=True)))
            torch.testing.assert_close(grad, alone)

    @on_native_backends
    def test_gradients_of_some_inputs_only(self, case: str, backend: str) -> None:
        function, leaves = make(case, backend)
        inputs = differentiable(leaves)
        together = torch.autograd.grad(function(*leaves).square().sum(), inputs)
        for index, expected in enumerate(together):
            for x in inputs:
                x.requires_grad_(x is inputs[index])
            (alone,) = torch.autograd.grad(function(*leaves).square().sum(), inputs[index])
            assert_same(alone, expected, backend)


# AOT dispatch traces second derivatives, seconds an op: only for cases that between them reach every op.
TRACED = ("pinv", "segments", "clustered", "block")


class TestOpcheck:
    """Schema, fake kernel, autograd registration and AOT dispatch of every op that a call reaches."""

    @on_native_backends
    def test_every_op_of_a_call(self, case: str, backend: str) -> None:
        function, leaves = make(case, backend)
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        checks += ["test_aot_dispatch_dynamic"] if case in TRACED else []
        for op, args in recorded_calls(function, leaves):
            torch.library.opcheck(op, args, test_utils=checks)


def recorded_calls(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[tuple[object, tuple]]:
    """The ops of this library that one forward and backward pass calls, with their arguments."""
    calls: list[tuple[object, tuple]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "nystromgan" and "native" not in op.name():
                calls.append((op, args))
            return op(*args, **(kwargs or {}))

    with Recorder():
        output = function(*leaves)
        torch.autograd.grad(output, differentiable(leaves), torch.ones_like(output))

    def leaf(op: object, x: object) -> object:
        differentiated = op is not OPS.cluster_landmarks.default  # assignments are constants
        return x.detach().requires_grad_(differentiated and x.is_floating_point()) if isinstance(x, Tensor) else x

    return [(op, tuple(leaf(op, x) for x in args)) for op, args in calls]


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self) -> None:
        torch.compiler.reset()

    @on_every_backend
    def test_one_graph_forward_and_backward(self, case: str, backend: str) -> None:
        function, leaves = make(case, backend)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        results = []
        for call in (function, compiled):
            output = call(*leaves)
            results.append((output, *torch.autograd.grad(output.square().sum(), differentiable(leaves))))
        for value, expected in zip(*results, strict=True):
            assert relative_error(value, expected) < 1e-6

    @pytest.mark.parametrize("backend", backends_of("nystrom_attention"))
    @pytest.mark.parametrize("options", [{}, {"cluster_iterations": 1}], ids=["segments", "clustered"])
    def test_one_graph_serves_every_number_of_tokens(self, backend: str, options: dict) -> None:
        graphs = []

        def counting(graph: torch.fx.GraphModule, example_inputs: list) -> Callable:
            graphs.append(graph)
            return graph.forward

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return nystrom_attention(query, key, value, num_landmarks=8, **options, backend=backend)

        compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counting)
        for count in (50, 51, 300, 999):
            inputs = attention_inputs(queries=count, keys=count + 7, device=device_of(backend))
            assert relative_error(compiled(**inputs), attend(**inputs)) < 1e-6
        assert len(graphs) <= 2

    @pytest.mark.parametrize("backend", backends_of("spatiotemporal_attention"))
    def test_one_graph_serves_every_grid(self, backend: str) -> None:
        graphs = []

        def counting(graph: torch.fx.GraphModule, example_inputs: list) -> Callable:
            graphs.append(graph)
            return graph.forward

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return spatiotemporal_attention(query, key, value, num_heads=2, backend=backend)

        compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counting)
        for grid, key_grid in (((4, 6), (2, 3)), ((5, 7), (3, 4)), ((9, 8), (10, 5))):
            inputs = map_inputs(grid=grid, key_grid=key_grid, device=device_of(backend))
            assert relative_error(compiled(**inputs), attend(**inputs)) < 1e-6
        assert len(graphs) <= 2

    def test_as_the_first_call_of_a_process(self) -> None:
        """Nothing may depend on an eager call having loaded a library or filled a cache before."""
        code = (
            "import torch, nystromgan\n"
            "@torch.compile(fullgraph=True, backend='aot_eager')\n"
            "def f(x): return nystromgan.nystrom_attention(x, x, x, num_landmarks=8, grid=(8, 16))\n"
            "x = torch.randn(1, 2, 128, 16, requires_grad=True)\n"
            "f(x).sum().backward()\n"
            "assert x.grad.isfinite().all()\n"
        )
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


class TestExport:
    @pytest.mark.parametrize("backend", backends_of("nystrom_attention"))
    def test_with_any_number_of_tokens(self, backend: str) -> None:
        class Attend(torch.nn.Module):
            def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                return nystrom_attention(query, key, value, num_landmarks=8, backend=backend)

        inputs = attention_inputs(queries=50, device=device_of(backend))
        count = torch.export.Dim("count", min=9, max=100_000)
        exported = torch.export.export(Attend(), (), inputs, dynamic_shapes={name: {2: count} for name in inputs})
        longer = attention_inputs(queries=333, device=device_of(backend))
        assert relative_error(exported.module()(**longer), Attend()(**longer)) < 1e-6


class TestAutocast:
    @pytest.mark.parametrize("case", [name for name, (op, *_) in CASES.items() if op is not iterative_pinv])
    def test_casts_inputs_and_gives_its_dtype(self, case: str) -> None:
        function, leaves = make(case, "reference")
        with torch.autocast("cpu", torch.bfloat16):
            output = function(*leaves)
        half = [x.bfloat16() if x.is_floating_point() else x for x in leaves]
        assert output.dtype == torch.bfloat16
        assert relative_error(output, function(*half)) < 1e-2
        for x, grad in zip(
            differentiable(leaves), torch.autograd.grad(output.float().sum(), differentiable(leaves)), strict=True
        ):
            assert grad.dtype == x.dtype == torch.float32

    @pytest.mark.parametrize("backend", backends_of("nystrom_attention"))
    def test_takes_mixed_dtypes_as_torch_does(self, backend: str) -> None:
        """Under autocast a projection gives bfloat16, a normalisation float32."""
        device = device_of(backend)
        inputs = attention_inputs(device=device)
        half = {name: x.bfloat16() for name, x in inputs.items()}
        with torch.autocast(device, torch.bfloat16):
            mixed = nystrom_attention(half["query"], inputs["key"], inputs["value"], num_landmarks=8, backend=backend)
        assert_same(mixed, nystrom_attention(**half, num_landmarks=8, backend=backend), backend)

    @pytest.mark.parametrize("backend", backends_of("iterative_pinv"))
    def test_leaves_the_pseudo_inverse_in_float32(self, backend: str) -> None:
        matrix = normal(4, 9, 9, device=device_of(backend))
        with torch.autocast(device_of(backend), torch.bfloat16):
            inverse = iterative_pinv(matrix, backend=backend)
        assert inverse.dtype == torch.float32
        assert_same(inverse, iterative_pinv(matrix, backend=backend), backend)
