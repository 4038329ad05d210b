"""One process or several: accelerate finds the group and the device; gradients are summed and logs averaged over it."""

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor

from nystromgan.zoo import config as tables


class Processes:
    """The group that this process trains in, alone or as torchrun or `accelerate launch` started it.

    Attributes:
        rank, count: this process's number and how many there are.
        main: whether it writes the files.
    """

    def __init__(self, device: str = "auto") -> None:
        asked = None if device == "auto" else tables.device(device)
        state = PartialState(cpu=device == "cpu")
        self.rank, self.count, self.main = state.process_index, state.num_processes, state.is_main_process
        self.device = state.device if asked is None or self.count > 1 else asked

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the processes, on each of them."""
        return reduce(tensor, "mean") if self.count > 1 else tensor

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Gradients become their sum over the processes, in one message."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.count == 1 or not gradients:
            return
        flat = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    def share(self, tensors: list[Tensor]) -> None:
        """Every process gets the first one's values."""
        if self.count > 1:
            for tensor in tensors:
                tensor.copy_(broadcast(tensor.clone(), from_process=0))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0) if self.count > 1 else flag

    def wait(self) -> None:
        PartialState().wait_for_everyone()
