"""Files that survive: written whole or not at all, and hashed; tensors as safetensors, never pickled."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

TEMPORARY = ".partial"


def write(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file by `content` atomically: a reader, or a crash at any moment, sees the old file or the new one.

    Raises:
        OSError: the disk is full, or the folder cannot be written; what was there before is unchanged.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(fresh, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        _sync_folder(path.parent)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise OSError(f"{path} could not be written: {reason}; what was there before is unchanged") from error


def _sync_folder(folder: pathlib.Path) -> None:
    """Makes a rename in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: pathlib.Path) -> None:
    """Deletes what writes that were killed left in a folder and below."""
    for path in folder.rglob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def save_tensors(path: pathlib.Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors and metadata as one safetensors file, with the tensors' hash in its metadata.

    Raises:
        ValueError: a tensor has values that are not finite, with its name.
        OSError: as `write`.
    """
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    for name, tensor in copies.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path} is not written: {name} has values that are not finite")
    write(path, _in_order(safetensors.torch.save(copies, {**metadata, "sha256": digest(copies)})))


def _in_order(content: bytes) -> bytes:
    """A file with its metadata sorted, which safetensors writes in any order: equal tensors are equal bytes."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[8 + length :]))


def load_tensors(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors and metadata, with the hash checked.

    Raises:
        FileNotFoundError, OSError: it is missing or unreadable.
        ValueError: it is truncated, corrupted, or was not written by `save_tensors`.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from error
    try:
        tensors = safetensors.torch.load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is truncated, corrupted or no safetensors file: {error}") from error
    if "sha256" not in metadata:
        raise ValueError(f"{path} has no sha256 in its metadata: nystromgan did not write it")
    if digest(tensors) != metadata["sha256"]:
        raise ValueError(f"{path} is corrupted: its tensors do not have the hash that it records")
    return tensors, metadata


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """load_state_dict with one clear ValueError: what is missing, what is unknown, which shapes differ."""
    try:
        found = module.load_state_dict(tensors, strict=False)
        problems = [f"{name} is missing" for name in found.missing_keys]
        problems += [f"{name} is unknown" for name in found.unexpected_keys]
    except RuntimeError as error:  # a line for each shape that differs
        problems = [line.strip().rstrip(".") for line in str(error).splitlines()[1:]]
    if problems:
        rest = f" and {len(problems) - 2} more" if len(problems) > 2 else ""
        kind = type(module).__name__
        raise ValueError(f"{origin} is of another model than this {kind}: {'; '.join(problems[:2])}{rest}")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, dtypes, shapes and values, in the names' order."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
