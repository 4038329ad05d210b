"""What the server of the tests' processes imports once, so that each of them starts in a tenth of a second."""

import accelerate  # noqa: F401
import PIL.Image  # noqa: F401
import tiny  # noqa: F401
import torch._dynamo  # noqa: F401

import nystromgan.zoo.cli.train
import nystromgan.zoo.data  # noqa: F401
