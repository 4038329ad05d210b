"""A fused spectral norm on the CPU divides a layer's input: no more convolutions are differentiated for it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nystromgan.nn import fuse_spectral_norm, spectral_norm


def network(norm: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        norm(nn.Conv2d(1, 8, 3)), nn.Tanh(), norm(nn.Conv2d(8, 8, 3)), nn.Tanh(), norm(nn.Conv2d(8, 1, 3))
    )


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def both() -> tuple[nn.Sequential, nn.Sequential]:
    return network(lambda module: module), fuse_spectral_norm(network(spectral_norm))


def test_a_gradient_of_the_input_alone_finds_no_weights() -> None:
    x = torch.randn(2, 1, 12, 12, requires_grad=True).clone()  # the counter takes no gradient of a leaf
    plain, normalised = (flops(lambda m=m: torch.autograd.grad(m(x).sum(), x)) for m in both())
    assert plain == normalised


def test_a_training_step_finds_no_gradient_of_the_networks_input() -> None:
    x = torch.randn(2, 1, 12, 12)
    plain, normalised = (flops(lambda m=m: m(x).sum().backward()) for m in both())
    assert plain == normalised


def test_a_penalty_on_the_inputs_gradient_differentiates_sigma_too() -> None:
    """As with W / sigma written out, sigma = u^T W v with u and v as constants."""
    fused = fuse_spectral_norm(network(spectral_norm)).double()
    x = torch.randn(2, 1, 12, 12, dtype=torch.float64)

    def penalty(model: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        return grad.square().sum()

    def written_out(image: Tensor) -> Tensor:
        for layer in fused:
            if isinstance(layer, nn.Tanh):
                image = layer(image)
                continue
            weight, norm = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
            sigma = norm._u @ weight.flatten(1) @ norm._v
            image = nn.functional.conv2d(image, weight / sigma, layer.bias)
        return image

    parameters = list(fused.parameters())
    found = torch.autograd.grad(penalty(fused), parameters)  # the step is made here, before u and v are read
    for ours, theirs in zip(found, torch.autograd.grad(penalty(written_out), parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
