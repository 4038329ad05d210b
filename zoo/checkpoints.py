"""Trained models on disk: a folder of model.safetensors, which holds the configuration too, config.json and a card."""

import json
import pathlib
from typing import Any

import torch
from torch import Tensor, nn

import nystromgan
from nystromgan.zoo import config as tables
from nystromgan.zoo import registry, storage

SHIPPED = pathlib.Path(__file__).parent / "checkpoints"
WEIGHTS = "model.safetensors"
HUB = "hf://"


def save_checkpoint(model: nn.Module, directory: str | pathlib.Path, card: str | None = None) -> pathlib.Path:
    """Writes config.json, model.safetensors and README.md (`card`, or a short one), each atomically.

    Args:
        model: of a paper of the zoo; its `config` rebuilds it.
        directory: made where it is missing.

    Raises:
        ValueError: the model is not of the zoo, or has weights that are not finite.
        OSError: the disk is full or read-only; the files that were there are unchanged.
    """
    directory = pathlib.Path(directory)
    description = {
        "paper": registry.name_of_paper(model),
        "config": tables.table(model.config),
        "nystromgan": nystromgan.__version__,
    }
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}
    storage.write(directory / "config.json", (json.dumps(description, indent=1) + "\n").encode())
    storage.save_tensors(directory / WEIGHTS, state, metadata)
    storage.write(directory / "README.md", (card or _card(model, description)).encode())
    return directory


def load_checkpoint(name_or_path: str | pathlib.Path, device: str | torch.device = "cpu", **config: Any) -> nn.Module:
    """A trained model in eval mode: of a checkpoint that ships, a folder, a run's folder, or a .safetensors file.

    `hf://owner/name` is downloaded (needs huggingface_hub); nothing else is. Nothing is unpickled.

    Args:
        config: fields of the configuration to change, such as `attention="exact"`; the weights must fit.

    Raises:
        FileNotFoundError: there is no such checkpoint; lists those that ship.
        ValueError: the file is truncated, corrupted, or does not fit the model that it names.
    """
    path = _locate(name_or_path)
    tensors, metadata = storage.load_tensors(path)
    description = _described(metadata, path)
    module = registry.paper(description["paper"])
    kind = type(next(iter(module.PRESETS.values())))
    where = f"the configuration in {path}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of what the file does not have: random landmarks, where it has none or others
        model = module.MODEL(tables.build(kind, {**description["config"], **config}, where))
    storage.load_strictly(model, tensors, str(path))
    return model.to(device).eval()


def describe(name_or_path: str | pathlib.Path) -> dict[str, Any]:
    """A checkpoint's "path", "paper", "config", "bytes" and "values"; raises as `load_checkpoint`."""
    path = _locate(name_or_path)
    tensors, metadata = storage.load_tensors(path)
    sizes = {"bytes": path.stat().st_size, "values": sum(tensor.numel() for tensor in tensors.values())}
    return {"path": str(path), **_described(metadata, path), **sizes}


def _described(metadata: dict[str, str], path: pathlib.Path) -> dict[str, Any]:
    """The paper and configuration that a file's metadata name."""
    if not {"paper", "config"} <= set(metadata):
        raise ValueError(f"{path} is no checkpoint of a model: its metadata has {', '.join(sorted(metadata))}")
    if metadata["paper"] not in registry.PAPERS:
        known = ", ".join(registry.PAPERS)
        raise ValueError(f"{path} is of {metadata['paper']!r}, which this version does not know ({known})")
    return {"paper": metadata["paper"], "config": json.loads(metadata["config"])}


def list_checkpoints() -> dict[str, int]:
    """The checkpoints that ship, with the sizes of their weights in bytes."""
    return {path.parent.name: path.stat().st_size for path in sorted(SHIPPED.glob(f"*/{WEIGHTS}"))}


def _locate(name_or_path: str | pathlib.Path) -> pathlib.Path:
    """The .safetensors file that a name or path means."""
    text = str(name_or_path)
    if text.startswith(HUB):
        return _download(text)
    path = pathlib.Path(text)
    shipped = SHIPPED / text / WEIGHTS
    for candidate in (path if path.is_file() else path / WEIGHTS, path / "model" / WEIGHTS, shipped):
        if candidate.is_file():
            return candidate
    if (path / "recipe.toml").is_file():
        train = tables.read_toml(path / "recipe.toml").get("train", {})
        first = min((train[name] for name in ("save_every", "steps") if name in train), default="its recipe says")
        raise FileNotFoundError(f"{text} has saved no model yet; its first save is at step {first}")
    names = ", ".join(list_checkpoints()) or "none"
    if text in registry.list_models():
        raise FileNotFoundError(f"{text} is a model that must be trained first; checkpoints that ship are: {names}")
    raise FileNotFoundError(
        f"no checkpoint is called {text!r}, and no folder or file there is one; shipped are: {names}"
    )


def _download(address: str) -> pathlib.Path:
    repository = address.removeprefix(HUB)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(f"an address must be {HUB}owner/name, got {address!r}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise RuntimeError(f"{address} needs huggingface_hub: pip install huggingface_hub") from None
    return pathlib.Path(hf_hub_download(repository, WEIGHTS))


def _card(model: nn.Module, description: dict[str, Any]) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    rows = "\n".join(f"| {key} | {value} |" for key, value in description["config"].items())
    return (
        f"# {type(model).__name__}\n\n{count:,} parameters; written by nystromgan {description['nystromgan']}.\n\n"
        f"| configuration | |\n|---|---|\n{rows}\n"
    )
