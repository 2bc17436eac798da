"""Read devices given by number or name, and check that this machine has them. Needs torch only."""

import torch


def as_device(device: int | str) -> torch.device:
    """Return the device with a CUDA device number (an int or text) or a name, as EasyEdit does.

    Raises:
        ValueError: If torch knows no such device.
    """
    is_number = isinstance(device, int) or device.isdecimal()
    try:
        return torch.device(f"cuda:{device}" if is_number else device)
    except RuntimeError:
        raise ValueError(
            f"device must be a CUDA device number, or a name such as 'cpu' or 'cuda:1'; got "
            f"{device!r}"
        ) from None


def check_device(device: int | str) -> None:
    """Check that this machine has a device; callers do so before they load a model.

    Args:
        device: CUDA device number, or a device name.

    Raises:
        ValueError: If torch knows no such device, or this machine has none.
    """
    found = as_device(device)
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            here = f"CUDA devices 0 to {count - 1} only" if count else "no CUDA device"
            raise ValueError(
                f"device must be on this machine, where torch finds {here}; got {device!r}: give "
                "another, or 'cpu'"
            )
        return
    try:
        torch.empty(0, device=found)
    # What torch raises for a device that it was built without differs from one to the next.
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(
            f"device must be on this machine; got {device!r}: give another, or 'cpu'"
        ) from None


def needs_missing_cuda(device: int | str) -> bool:
    """Tell whether a device is a CUDA device, and this machine has none at all."""
    return as_device(device).type == "cuda" and not torch.cuda.is_available()
