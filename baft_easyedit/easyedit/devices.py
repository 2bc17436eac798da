"""Run code that hard-codes `cuda:N` on the device that was really asked for.

Only the PyPI release of EasyEdit needs it: it writes `f"cuda:{device}"` everywhere. Without CUDA
all of those mean the CPU; with CUDA only names that cannot exist, such as `cuda:cpu`, are put
right.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class DeviceRemap(TorchFunctionMode):
    """Put right the CUDA devices named in calls to torch inside this context."""

    def __init__(self) -> None:
        super().__init__()
        self.has_cuda = torch.cuda.is_available()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace device arguments of one call."""
        if func is torch.Tensor.cuda and not self.has_cuda:
            return args[0]
        # In `.to(0)` a bare number is a CUDA device; elsewhere it is only a number.
        is_move = func is torch.Tensor.to or getattr(func, "__name__", "") == "_parse_to"
        args = tuple(self._device(value, is_move) for value in args)
        options = dict(kwargs or {})
        if "device" in options:
            options["device"] = self._device(options["device"], True)
        return func(*args, **options)

    def _device(self, value: Any, number_is_device: bool) -> Any:
        """Return the device meant by one argument; anything else as it is."""
        if isinstance(value, str) and value.startswith("cuda:"):
            named = value.removeprefix("cuda:")
            value = value if named.isdigit() else named
        names_cuda = (
            (isinstance(value, str) and value.startswith("cuda"))
            or (isinstance(value, torch.device) and value.type == "cuda")
            or (number_is_device and type(value) is int)
        )
        return torch.device("cpu") if names_cuda and not self.has_cuda else value


def honoured_device(generation: str, device: Any) -> AbstractContextManager[Any]:
    """Return the context in which EasyEdit's code runs on `device`, as its hyper-parameters say."""
    if generation == "current" or (torch.cuda.is_available() and type(device) is int):
        return nullcontext()
    return DeviceRemap()
