"""Memory that is used again: only what nothing holds, for a limited size, given back when asked."""

import concurrent.futures
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import nystromgan
from nystromgan import _recycled
from nystromgan.testing import relative_error

pytestmark = pytest.mark.skipif(bool(nystromgan.available_backends()["cpu"]), reason="needs the native CPU library")
TOKENS = 2**12
SIZE = TOKENS * 64 * 4  # bytes of 64 channels of float32: 1 MiB, from which memory is kept


@pytest.fixture(autouse=True)
def empty_pool() -> Iterator[None]:
    nystromgan.empty_cache()
    yield
    nystromgan.empty_cache()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randn(1, 1, TOKENS, 64)


def _attend(x: Tensor) -> Tensor:
    return nystromgan.nystrom_attention(x, x, x, num_landmarks=2)


def test_memory_is_used_again_when_no_tensor_or_view_holds_it(tokens: Tensor) -> None:
    first = _attend(tokens)
    place, expected = first.data_ptr(), first.clone()
    second = _attend(tokens)
    assert second.data_ptr() != place
    view = first[0, 0, 5:7].numpy()
    del first
    third = _attend(-tokens)
    assert third.data_ptr() not in (place, second.data_ptr())
    assert (view == expected[0, 0, 5:7].numpy()).all()
    del view
    fourth = _attend(tokens)
    assert fourth.data_ptr() == place
    assert torch.equal(fourth, expected)
    assert torch.equal(second, expected)


def test_training_uses_it_again_and_a_graph_keeps_it(tokens: Tensor) -> None:
    x = tokens.detach().requires_grad_()
    kept = []
    for _ in range(4):
        torch.autograd.grad(_attend(x).square().sum(), x)
        kept.append(len(_recycled._pool))
    assert kept[0] in (3, 4)  # gradients of queries, keys and values, and the output, if it is not one of them by now
    assert kept == kept[:1] * 4
    out = _attend(x)
    place, loss = out.data_ptr(), out.square().sum()  # whose graph holds it
    del out
    assert _attend(tokens).data_ptr() != place
    loss.backward()


def test_modes_of_torch(tokens: Tensor) -> None:
    with torch.inference_mode():
        place = _attend(tokens).data_ptr()
    x = tokens.detach().requires_grad_()
    out = _attend(x)
    assert out.data_ptr() == place
    out.sum().backward()  # memory of an inference tensor serves one that tracks gradients
    expected = out.detach().clone()
    del out
    torch.compiler.reset()
    compiled = torch.compile(_attend, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(tokens), expected) < 1e-6


def test_maps_too() -> None:
    x = torch.randn(2, 64, 256, 256)

    def attend() -> Tensor:
        return nystromgan.spatiotemporal_attention(x[:, :1], x[:, :1, :4, :4], x[..., :4, :4])

    first = attend()
    place, expected = first.data_ptr(), first.clone()
    del first
    again = attend()
    assert again.data_ptr() == place
    assert torch.equal(again, expected)


def test_what_is_kept_is_limited_and_given_back(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recycled.os, "sysconf", lambda name: SIZE // 2**12 * 3 * 16 if "PHYS" in name else 2**12)
    held = [_attend(tokens) for _ in range(5)]
    kept = len(_recycled._pool)  # counted apart, as pytest would show every byte of a storage
    assert kept == 3
    assert len({out.data_ptr() for out in held}) == 5
    nystromgan.empty_cache()
    kept = len(_recycled._pool)
    assert kept == 0
    assert all(torch.equal(out, held[0]) for out in held)
    held[0].resize_(1, 1, TOKENS + 1, 64)  # memory of the cache is like any other
    _attend(tokens[:, :, 1:])
    kept = len(_recycled._pool)
    assert kept == 0  # below the size from which it pays


def test_of_many_sizes_the_latest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recycled, "MOST_POOLED", 4)
    for extra in range(6):
        _attend(torch.randn(1, 1, TOKENS + extra, 64))
    sizes = [storage.nbytes() for storage in _recycled._pool]
    assert sizes == [SIZE + 256 * extra for extra in range(2, 6)]


def test_threads_share_it() -> None:
    """Each finds memory of its own, whatever the others take, give back or drop meanwhile."""
    weight = torch.randn(256, 256)
    interval = sys.getswitchinterval()

    def work(seed: int) -> bool:
        value = torch.full((1,), float(seed))
        for step in range(400):
            made = [_recycled.empty_like(weight), _recycled._from_pool(weight, [32 + seed % 2, 256])]
            for tensor in made:
                tensor.copy_(value.expand_as(tensor))
            if step % 2 == 0:
                nystromgan.empty_cache()
            if not all((tensor == seed).all() for tensor in made):
                return False
        return True

    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            assert all(threads.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)
