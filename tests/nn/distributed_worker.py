"""What each of two processes of test_distributed.py runs: `python distributed_worker.py NAME RANK FILE`."""

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import spectral_norm as legacy_spectral_norm

from nystromgan.nn import NystromAttention, SelfAttention2d, SelfAttention3d, fuse_spectral_norm, spectral_norm

STEPS, BATCH, RATE = 4, 4, 0.05


class Attention(nn.Module):
    """Tokens (B, 40, 16) -> (B, 40, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = NystromAttention(16, 2, num_landmarks=5, cluster_iterations=1, conv_kernel_size=3)
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0])


def discriminator(norm: Callable = spectral_norm) -> nn.Sequential:
    """Images (B, 3, 8, 8) -> logits (B, 1)."""
    attention = SelfAttention2d(8, num_landmarks=(2, 2), query_channels=4)
    nn.init.constant_(attention.gamma, 0.5)
    return nn.Sequential(
        norm(nn.Conv2d(3, 8, 3, padding=1)),
        nn.LeakyReLU(0.2),
        attention,
        nn.Flatten(),
        norm(nn.Linear(512, 6)),
        nn.Tanh(),
        norm(nn.Linear(6, 1)),
    )


def video_discriminator() -> nn.Sequential:
    """Clips (B, 2, 4, 6, 6) -> logits (B, 1): clusters on pooled keys, and landmarks drawn in each forward."""
    pooled = SelfAttention3d(4, num_landmarks=(2, 2, 2), query_channels=2, pool=(1, 2, 2), cluster_iterations=1)
    drawn = SelfAttention3d(4, num_landmarks=9, query_channels=2, landmarks="random")
    for attention in (pooled, drawn):
        nn.init.constant_(attention.gamma, 0.5)
    return nn.Sequential(
        spectral_norm(nn.Conv3d(2, 4, 3, padding=1)),
        pooled,
        drawn,
        nn.Flatten(),
        spectral_norm(nn.Linear(576, 6)),
        nn.Tanh(),
        spectral_norm(nn.Linear(6, 1)),
    )


MODELS = {
    "attention": (Attention, (40, 16)),
    "discriminator": (discriminator, (3, 8, 8)),
    "fused discriminator": (lambda: fuse_spectral_norm(discriminator()), (3, 8, 8)),
    "fused legacy discriminator": (lambda: fuse_spectral_norm(discriminator(legacy_spectral_norm)), (3, 8, 8)),
    "video discriminator": (lambda: fuse_spectral_norm(video_discriminator()), (2, 4, 6, 6)),
}


def train(name: str, wrapper: str | None, rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
    """The state after a few steps on this process's share of every batch."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    make, shape = MODELS[name]
    model = make()
    trained = model
    if wrapper == "ddp":
        trained = DistributedDataParallel(model)
    if wrapper == "fsdp":
        for child in model.children():
            if any(True for _ in child.parameters()):
                fully_shard(child)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for step in range(STEPS):
        batch = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        trained(batch[rank::processes]).square().mean().backward()
        optimizer.step()
    full = {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value
        for key, value in model.state_dict().items()
    }
    return {key: value.detach().clone() for key, value in full.items()}


if __name__ == "__main__":
    wrapper, rank, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/{wrapper}.store", rank=rank, world_size=2)
    torch.save({name: train(name, wrapper, rank, 2) for name in MODELS}, f"{folder}/{wrapper}.{rank}.pt")
    dist.destroy_process_group()
