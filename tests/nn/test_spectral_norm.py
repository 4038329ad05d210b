"""spectral_norm and fuse_spectral_norm: torch's values over training, its state dict, and a cheap eval."""

import copy
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as legacy_spectral_norm

from nystromgan.nn import (
    SelfAttention2d,
    convert_legacy_state_dict,
    fuse_spectral_norm,
    spectral_norm,
    spectral_norm_buffers,
)
from nystromgan.nn import spectral_norm as ours


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    """Two threads on tensors this small mostly wait for each other: 30 times slower on a busy machine."""
    torch.set_num_threads(1)


def _same(model: nn.Module) -> nn.Module:
    return model


# How a discriminator is normalised, and which form of torch it must agree with.
TORCH = parametrizations.spectral_norm
FORMS: dict[str, tuple[Callable, Callable, Callable]] = {
    "ours": (ours, _same, TORCH),
    "ours fused": (ours, fuse_spectral_norm, TORCH),
    "torch fused": (TORCH, fuse_spectral_norm, TORCH),
    "legacy fused": (legacy_spectral_norm, fuse_spectral_norm, legacy_spectral_norm),
}
every_form = pytest.mark.parametrize("form", FORMS)


class PlainAttention(nn.Module):
    """SelfAttention2d(6, num_landmarks=4, query_channels=2) on images (B, 6, 8, 8), in plain PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.query, self.key, self.value = nn.Conv2d(6, 2, 1), nn.Conv2d(6, 2, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x) * 2**-0.5, self.key(x), self.value(x).flatten(2).mT  # scaled by D
        landmarks = [nn.functional.avg_pool2d(maps, 4).flatten(2).mT for maps in (query, key)]  # (B, 4, 2)
        query, key = query.flatten(2).mT, key.flatten(2).mT  # (B, 64, 2)
        left, right = (query @ landmarks[1].mT).softmax(-1), (landmarks[0] @ key.mT).softmax(-1)
        core = (landmarks[0] @ landmarks[1].mT).softmax(-1)  # (B, 4, 4)
        eye, inverse = torch.eye(4), core.mT / core.sum(-2).amax(-1)[:, None, None]
        for _ in range(6):
            product = core @ inverse
            inverse = inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product))) / 4
        return x + self.gamma * (left @ (inverse @ (right @ value))).mT.reshape(x.shape)


def _discriminator(norm: Callable, plain: bool = False, **options: Any) -> nn.Sequential:
    """Images (B, 3, 8, 8) -> logits (B, 1): odd sizes, a transposed convolution and attention."""
    torch.manual_seed(0)
    attention = PlainAttention() if plain else SelfAttention2d(6, num_landmarks=4, query_channels=2)
    nn.init.constant_(attention.gamma, 0.5)
    return nn.Sequential(
        norm(nn.Conv2d(3, 6, 3, padding=1), **options),
        nn.LeakyReLU(0.2),
        attention,
        norm(nn.ConvTranspose2d(6, 5, 3), **options),
        nn.Softplus(),
        nn.Flatten(),
        norm(nn.Linear(500, 7), **options),
        nn.Tanh(),
        norm(nn.Linear(7, 1, bias=False), **options),
    )


def _pair(form: str, **options: Any) -> tuple[nn.Sequential, nn.Sequential]:
    """A discriminator in this form, and one with the same state without any of our code."""
    norm, finish, torch_norm = FORMS[form]
    expected = _discriminator(torch_norm, plain=True, **options)
    model = finish(_discriminator(norm, **options))
    model.load_state_dict(expected.state_dict())
    return model, expected


def _images(batch: int = 2, **options: Any) -> Tensor:
    return torch.randn(batch, 3, 8, 8, **options)


def _train(model: nn.Module, penalty: str, steps: int = 10) -> dict[str, Tensor]:
    """The state after steps of a discriminator's loss with a gradient penalty, two or three forwards a step."""
    torch.manual_seed(1)
    # At ten times this rate torch itself ends 6e-3 away after its weights are moved by one rounding.
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(steps):
        real, fake = _images(requires_grad=True), _images()
        logits = model(real)
        loss = nn.functional.softplus(-logits).mean() + nn.functional.softplus(model(fake)).mean()
        if penalty == "r1":
            (grad,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
            loss = loss + 5 * grad.square().sum((1, 2, 3)).mean()
        else:
            between = real.detach().lerp(fake, torch.rand(2, 1, 1, 1)).requires_grad_()
            (grad,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
            loss = loss + 10 * (grad.square().sum((1, 2, 3)).sqrt() - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


@every_form
@pytest.mark.parametrize("penalty", ["r1", "wgan-gp"])
@pytest.mark.parametrize("n_power_iterations", [1, 3])
def test_trains_as_torch(form: str, penalty: str, n_power_iterations: int) -> None:
    model, expected = _pair(form, n_power_iterations=n_power_iterations)
    states = _train(model, penalty), _train(expected, penalty)
    assert list(states[0]) == list(states[1])
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=2e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    "layer", [nn.Linear(5, 3), nn.Conv3d(4, 6, 3), nn.ConvTranspose1d(4, 6, 5), nn.Embedding(9, 4)]
)
def test_starts_and_draws_as_torch(layer: nn.Module) -> None:
    torch.manual_seed(2)
    expected = TORCH(copy.deepcopy(layer))
    torch.manual_seed(2)
    actual = spectral_norm(copy.deepcopy(layer))
    assert list(actual.state_dict()) == list(expected.state_dict())
    for one, other in zip(actual.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    weight = actual.weight  # each access is a step
    assert weight.is_contiguous()
    torch.testing.assert_close(weight, expected.weight, rtol=1e-4, atol=1e-5)


def test_the_normalised_weight_has_norm_one() -> None:
    weight = spectral_norm(nn.Linear(20, 30), n_power_iterations=50).weight
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1.0, abs=1e-3)


def test_a_vector_is_divided_by_its_norm() -> None:
    layer = spectral_norm(nn.PReLU(5))
    assert layer.weight.norm().item() == pytest.approx(1.0)
    assert list(layer.state_dict()) == ["parametrizations.weight.original"]


@every_form
def test_each_use_of_a_layer_is_a_step_as_with_torch(form: str) -> None:
    norm, finish, torch_norm = FORMS[form]

    class Twice(nn.Module):
        def __init__(self, norm: Callable) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = norm(nn.Linear(6, 6))
            self.unused = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    model, expected = finish(Twice(norm)), Twice(torch_norm)
    x = torch.randn(3, 6)
    for _ in range(3):
        torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-5)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_grouped_launch_takes_no_gradient_from_what_is_not_used() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = spectral_norm(nn.Linear(6, 6)), spectral_norm(nn.Linear(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = fuse_spectral_norm(Half())
    model(torch.randn(3, 6)).square().sum().backward()
    assert model.used.parametrizations.weight.original.grad.abs().sum() > 0
    grad = model.unused.parametrizations.weight.original.grad
    assert grad is None or not grad.any()
    with torch.no_grad():
        model.unused.parametrizations.weight.original.mul_(3)
    assert model.unused.parametrizations.weight[0].ready is None
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.randn(3, 5))
    assert model.unused.parametrizations.weight[0].ready is None


@every_form
def test_eval_never_updates_and_gives_torch_values(form: str) -> None:
    model, expected = _pair(form)
    state = {name: value.clone() for name, value in model.eval().state_dict().items()}
    x = _images()
    torch.testing.assert_close(model(x), expected.eval()(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def _halve_in_place(layer: nn.Module) -> None:
    layer.parametrizations.weight.original.mul_(0.5).add_(0.1)


def _replace(layer: nn.Module) -> None:
    layer.parametrizations.weight.original = nn.Parameter(torch.randn(3, 5))


def _load(layer: nn.Module) -> None:
    layer.load_state_dict(spectral_norm(nn.Linear(5, 3)).state_dict())


def _move_vector(layer: nn.Module) -> None:
    layer.parametrizations.weight[0]._v.copy_(nn.functional.normalize(torch.randn(5), dim=0))


def _write_behind_versions(layer: nn.Module) -> None:
    layer.parametrizations.weight.original.data.add_(0.3)
    layer.eval()


def _other_data(layer: nn.Module) -> None:
    layer.parametrizations.weight.original.data = torch.randn(3, 5)


def _to_float64_and_back(layer: nn.Module) -> None:
    layer.double()
    _halve_in_place(layer)
    layer.float()


@pytest.mark.parametrize(
    "change",
    [_halve_in_place, _replace, _load, _move_vector, _write_behind_versions, _other_data, _to_float64_and_back],
)
def test_eval_keeps_the_weight_until_it_changes(change: Callable[[nn.Module], None]) -> None:
    layer, x = spectral_norm(nn.Linear(5, 3)).eval(), torch.randn(2, 5)
    with torch.no_grad():
        assert layer.weight is layer.weight
        before = layer(x)
        change(layer)
        after = layer(x)
    expected = TORCH(nn.Linear(5, 3)).eval()
    expected.load_state_dict(layer.state_dict())
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected(x))


def test_the_kept_weight_serves_calls_with_gradients_and_inference_mode() -> None:
    layer = spectral_norm(nn.Linear(5, 3)).eval().requires_grad_(False)
    with torch.inference_mode():
        layer(torch.randn(2, 5))
    x = torch.randn(2, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(grad, layer.weight.sum(0).expand(2, 5))
    layer.requires_grad_(True)
    layer(x).sum().backward()
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None


def test_a_frozen_discriminator_recalls_its_weights_in_a_generators_step() -> None:
    model = _discriminator(spectral_norm).eval().requires_grad_(False)
    for _ in range(2):
        fake = _images(requires_grad=True)
        (grad,) = torch.autograd.grad(model(fake).sum(), fake)
        assert grad.any()
        weights = [module.weight for module in _normed(model)]
        assert all(module.weight is weight for module, weight in zip(_normed(model), weights, strict=True))


def _normed(model: nn.Sequential) -> list[nn.Module]:
    return [module for module in model if hasattr(module, "parametrizations")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer = spectral_norm(nn.Linear(20, 30, dtype=dtype))
    assert layer.weight.dtype == dtype
    assert torch.linalg.matrix_norm(layer.weight.double(), 2).item() == pytest.approx(1.0, abs=0.1)


def test_gradgradcheck() -> None:
    layer = spectral_norm(nn.ConvTranspose2d(2, 3, 2, dtype=torch.float64)).eval()
    weight = layer.parametrizations.weight.original.detach().requires_grad_()
    norm = layer.parametrizations.weight[0]
    assert torch.autograd.gradcheck(norm, weight)
    assert torch.autograd.gradgradcheck(norm, weight)


@every_form
@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(form: str, training: bool) -> None:
    torch.compiler.reset()
    norm, finish, _ = FORMS[form]
    models = [finish(_discriminator(norm)).train(training) for _ in range(2)]
    x = _images()
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    for _ in range(2):
        outputs = compiled(x), models[1](x)
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)
    for one, other in zip(models[0].buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 6)),
    "reflected": (lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 7)),
    "transposed": (lambda: nn.ConvTranspose3d(3, 4, 2), (2, 3, 3, 2, 4)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("small", [True, False])
def test_a_divided_input_gives_what_a_divided_weight_does(
    layer: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = LAYERS[layer]
    monkeypatch.setattr(sys.modules["nystromgan.nn.fuse_spectral_norm"], "SMALL", 2**19 if small else -1)
    model = fuse_spectral_norm(nn.Sequential(ours(make().double())))
    expected = nn.Sequential(TORCH(make().double()))
    expected.load_state_dict(model.state_dict())
    inputs = []
    model[0].register_forward_hook(lambda module, arguments, output: inputs.append(arguments[0]))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = []
    for one in (model, expected):
        parameters = [x, *one.parameters()]
        grads = torch.autograd.grad(one(x).pow(3).sum(), parameters, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        found.append([*grads, *torch.autograd.grad(penalty, parameters)])
    assert torch.equal(inputs[0], x) != (small or x.numel() <= model[0].parametrizations.weight.original.numel())
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
    outside = model[0].weight.flatten(1) if layer != "transposed" else model[0].weight.movedim(1, 0).flatten(1)
    assert 0.5 < torch.linalg.matrix_norm(outside.detach(), 2).item() < 2  # W / sigma as ever


def test_a_layer_that_is_not_linear_in_its_weight_keeps_its_input() -> None:
    class Squared(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.square(), self.bias)

    model, expected = fuse_spectral_norm(nn.Sequential(ours(Squared(5, 3)))), nn.Sequential(TORCH(Squared(5, 3)))
    expected.load_state_dict(model.state_dict())
    x = torch.randn(2, 5)
    torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-6)


@every_form
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")  # of torch's older form, without us too
def test_exports_in_eval(form: str) -> None:
    model, _ = _pair(form)
    x = _images()
    program = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_form
@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
def test_copies_go_on_as_the_model_does(form: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, _ = _pair(form)
    x = _images()
    model(x)
    if form == "legacy fused":  # a training forward leaves its graph on the module, which torch does not copy
        with torch.no_grad():
            model(x)
    twin = duplicate(duplicate(model))
    assert list(twin.state_dict()) == list(model.state_dict())
    for training in (True, False, True):
        outputs = [one.train(training)(x) for one in (model, twin)]
        assert torch.equal(*outputs)
        grads = [
            torch.autograd.grad(y.sum(), list(one.parameters())) for y, one in zip(outputs, (model, twin), strict=True)
        ]
        assert all(map(torch.equal, *grads))
    with torch.no_grad():
        twin[0].bias.add_(1)
    assert not torch.equal(twin(x), model(x))


def test_pickling_keeps_other_parametrizations_names_and_ties() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    globals()["Doubled"] = Doubled  # pickle finds classes by name
    Doubled.__qualname__ = "Doubled"
    module = spectral_norm(nn.LSTM(3, 4), "weight_hh_l0")
    nn.utils.parametrize.register_parametrization(module, "weight_ih_l0", Doubled())
    module.again = module.parametrizations.weight_ih_l0.original
    try:
        twin = _pickled(module)
    finally:
        del globals()["Doubled"]
    assert type(twin).__name__ == "ParametrizedLSTM"
    assert twin.again is twin.parametrizations.weight_ih_l0.original
    module.eval(), twin.eval()
    x = torch.randn(5, 2, 3)
    assert torch.equal(twin(x)[0], module(x)[0])
    nn.utils.parametrize.remove_parametrizations(twin, "weight_hh_l0")
    assert torch.equal(twin.weight_hh_l0, module.weight_hh_l0)


@every_form
def test_functional_call(form: str) -> None:
    (model, _), (other, _) = _pair(form), _pair(form)
    x = _images()
    model(x)
    expected = model.eval()(x)
    torch.testing.assert_close(torch.func.functional_call(other.eval(), dict(model.state_dict()), x), expected)
    torch.testing.assert_close(other(x), other(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_torch_func_are_those_of_autograd(fused: bool, training: bool) -> None:
    layers = [spectral_norm(nn.Conv1d(4, 6, 3)), nn.ReLU(), spectral_norm(nn.Conv1d(6, 5, 3))]
    model = nn.Sequential(*layers).train(training)
    other = copy.deepcopy(model)  # steps change u and v
    if fused:
        fuse_spectral_norm(model), fuse_spectral_norm(other)
    x = torch.randn(2, 4, 20)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    parameters = {name: value.detach() for name, value in other.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(other, parameters, x).square().sum()

    for grad, other_grad in zip(torch.func.grad(loss)(parameters).values(), expected, strict=True):
        torch.testing.assert_close(grad, other_grad)


def test_made_on_meta_then_filled() -> None:
    with torch.device("meta"):
        model = fuse_spectral_norm(_discriminator(spectral_norm))
    source = _discriminator(spectral_norm).eval()
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = _images()
    assert torch.equal(model.eval()(x), source(x))


@every_form
def test_frozen_parts_and_checkpointing(form: str) -> None:
    model, expected = _pair(form)
    for one in (model, expected):
        one[0].requires_grad_(False)
    x = _images(requires_grad=True)
    grads = []
    for one in (model, expected):
        y = torch.utils.checkpoint.checkpoint(one, x, use_reentrant=False)
        grads.append(torch.autograd.grad(y.sum(), [x, one[-1].bias] if one[-1].bias is not None else [x]))
    for actual, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@every_form
def test_autocast(form: str) -> None:
    model = _pair(form)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert model(_images()).dtype == torch.bfloat16
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())


@pytest.mark.parametrize("form", [*FORMS, "torch"])
def test_buffers_are_found_under_their_names(form: str) -> None:
    norm, finish, _ = FORMS.get(form, (TORCH, _same, TORCH))
    model = nn.ModuleDict({"body": finish(_discriminator(norm))})
    found = spectral_norm_buffers(model)
    assert found == {name for name in model.state_dict() if name.endswith(("_u", "_v"))}
    assert len(found) == 8


@every_form
def test_an_average_of_weights_that_copies_the_buffers_works(form: str) -> None:
    """The helper's purpose: averaged u and v are no unit vectors."""
    model, _ = _pair(form)
    buffers = spectral_norm_buffers(model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(_images()).sum().backward()
        optimizer.step()
    state = model.state_dict()
    for copied in (buffers, set()):
        average = {name: value if name in copied else (start[name] + value) / 2 for name, value in state.items()}
        twin, _ = _pair(form)
        twin.load_state_dict(average)
        lengths = torch.stack([twin.state_dict()[name].norm() for name in buffers])
        assert torch.allclose(lengths, torch.ones(len(buffers))) == bool(copied)
    assert twin(_images()).isfinite().all()


def test_a_legacy_checkpoint_loads_after_conversion() -> None:
    legacy = _discriminator(legacy_spectral_norm)
    legacy(_images())
    state = convert_legacy_state_dict(legacy.state_dict())
    x = _images()
    expected = legacy.eval()(x)
    for norm in (spectral_norm, TORCH):
        model = _discriminator(norm)
        model.load_state_dict(state)
        torch.testing.assert_close(model.eval()(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="state_dict must have weight_v beside weight_orig, got none"):
        convert_legacy_state_dict({"weight_orig": x, "weight_u": x})


def test_bad_use() -> None:
    with pytest.raises(ValueError, match="name must be a parameter of Linear, got 'wight'"):
        spectral_norm(nn.Linear(3, 3), "wight")
    with pytest.raises(ValueError, match="n_power_iterations must be at least 1, got 0"):
        spectral_norm(nn.Linear(3, 3), n_power_iterations=0)
    with pytest.raises(IndexError, match="dim must be between -2 and 1, got 2"):
        spectral_norm(nn.Linear(3, 3), dim=2)
    with pytest.raises(ValueError, match="model must contain a spectral norm, got Linear without one"):
        fuse_spectral_norm(nn.Linear(3, 3))
