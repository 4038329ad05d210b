"""The comparisons that the op tests stand on: they must see a wrong value, a wrong gradient and a worse form."""

import math

import pytest
import torch
from torch import Tensor

from nystromgan import testing

INPUTS = {"query": testing.normal(5, 7)}


def _op(query: Tensor, *, backend: str, value_error: float = 0.0, gradient_error: float = 0.0) -> Tensor:
    """The square, wrong by the given relative errors in every dtype but float64."""
    if query.dtype == torch.float64:
        return query.square()
    return query.square() * (1 + value_error) + gradient_error * (query.square() - query.detach().square())


def test_the_right_function_passes_and_its_errors_come_back() -> None:
    errors = testing.assert_matches_reference(_op, INPUTS, "cpu")
    assert errors.output < 1e-6
    assert errors.gradients.keys() == {"query"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"value_error": 2e-5}, r"above tolerance: output 2\.00e-05 > 1\.00e-05"),
        ({"gradient_error": 6e-5}, r"above tolerance: grad_query 6\.00e-05 > 5\.00e-05"),
        ({"value_error": math.nan}, "above tolerance: output nan"),
    ],
)
def test_an_error_just_above_the_tolerance_is_seen(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.assert_matches_reference(_op, INPUTS, "cpu", **wrong)


def test_what_is_worse_than_eager_is_seen() -> None:
    options = {"tolerance": testing.NO_TOLERANCE, "value_error": 8e-6}
    testing.assert_matches_reference(_op, INPUTS, "cpu", eager=lambda query: query.square() * (1 + 8e-6), **options)
    with pytest.raises(AssertionError, match="above eager's error: output"):
        testing.assert_matches_reference(_op, INPUTS, "cpu", eager=lambda query: query.square(), **options)


def test_relative_error_is_a_ratio_of_norms() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert testing.relative_error(expected + torch.tensor([0.0, 0.5]), expected) == pytest.approx(0.1)
    assert testing.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert testing.relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    with pytest.raises(AssertionError, match="shapes differ"):
        testing.relative_error(torch.zeros(2), torch.zeros(1, 2))


def test_factories_give_the_same_numbers_in_every_dtype() -> None:
    for draw in (testing.normal, testing.smooth, testing.large):
        exact = draw(2, 40, 3, dtype=torch.float64)
        assert torch.equal(draw(2, 40, 3, dtype=torch.bfloat16), exact.bfloat16())
        assert not torch.equal(draw(2, 40, 3, dtype=torch.float64, seed=1), exact)


def test_smooth_tokens_resemble_their_neighbours() -> None:
    tokens = testing.smooth(4, 500, 8)
    steps = tokens.diff(dim=-2).square().mean() / tokens.square().mean()
    assert steps < 0.05 < testing.normal(4, 500, 8).diff(dim=-2).square().mean()


@pytest.mark.parametrize("scattered", [False, True])
def test_padding_mask_keeps_as_many_tokens_as_asked(scattered: bool) -> None:
    mask = testing.padding_mask([0, 3, 10], 10, scattered=scattered)
    assert mask.dtype == torch.bool
    assert (~mask).sum(-1).tolist() == [0, 3, 10]
    assert scattered or not mask[1, :3].any()
