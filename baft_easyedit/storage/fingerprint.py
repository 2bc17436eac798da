"""Which model an edit belongs to: its parameters' names, shapes, dtypes, and samples of values."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from baft_easyedit.files.reading import taken

_SAMPLES = 1024
"""About how many values of each parameter are looked at."""


@dataclass(frozen=True)
class Fingerprint:
    """What tells models apart; equal on every device, also where accelerate keeps the weights away.

    Adapters such as PEFT's LoRA count: the model computes with them. So does the dtype: nobody has
    tried an edit of fp32 weights on the same weights in bf16. `torch.compile` does not count.

    About 1024 values of each parameter are looked at, in even steps through all rows and columns.
    Missed are changes of other values only (a handful of single weights), of buffers, of the code,
    and of what is set without weights, such as an adapter's scale.
    """

    num_parameters: int
    """Parameter tensors."""
    names: str
    """SHA-256 of their names and shapes."""
    dtypes: str
    """Their dtypes, such as `float32`."""
    values: str
    """SHA-256 of the samples."""
    rounded_values: str
    """SHA-256 of the samples rounded to bf16; the same for one model loaded in two precisions."""

    @classmethod
    def of(cls, model: nn.Module) -> "Fingerprint":
        """Look at a model.

        Raises:
            ValueError: If a parameter's values are nowhere to be found.
        """
        names, values, rounded = (hashlib.sha256() for _ in range(3))
        parameters = list(_parameters(model))
        for name, parameter, where in parameters:
            names.update(f"{name}{tuple(parameter.shape)};".encode())
            sample = _sample(name, parameter, where)
            values.update(_bytes(sample))
            rounded.update(_bytes(sample.bfloat16() if sample.is_floating_point() else sample))
        dtypes = {str(parameter.dtype).removeprefix("torch.") for _, parameter, _ in parameters}
        return cls(
            num_parameters=len(parameters),
            names=names.hexdigest(),
            dtypes=", ".join(sorted(dtypes)),
            values=values.hexdigest(),
            rounded_values=rounded.hexdigest(),
        )

    @classmethod
    def from_json(cls, content: dict[str, Any], where: str) -> "Fingerprint":
        """Read a JSON object of the fields; ValueError if one is missing or of another type."""
        return cls(**{f.name: taken(content, f.name, f.type, where) for f in fields(cls)})

    def difference(self, other: "Fingerprint") -> str | None:
        """Say in words how another model differs from this one; None if it does not."""
        if self.names != other.names:
            return (
                "its parameters have other names or shapes "
                f"({self.num_parameters} tensors then, {other.num_parameters} now; adapters such "
                "as LoRA count)"
            )
        if self.dtypes != other.dtypes and self.rounded_values == other.rounded_values:
            return (
                f"its weights are the same in another precision ({self.dtypes} then, "
                f"{other.dtypes} now)"
            )
        if (self.dtypes, self.values) != (other.dtypes, other.values):
            return "its weights have other values"
        return None


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """Yield the parameters with their names and the modules that hold them; tied ones once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name.replace("_orig_mod.", ""), parameter, module


def _sample(name: str, parameter: Tensor, module: nn.Module) -> Tensor:
    """Return some values of a parameter, on the CPU."""
    if parameter.is_meta:
        stored = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if stored is None:
            raise ValueError(
                f"the model's weights must be in memory; {name} is on the meta device: load the "
                "model with its weights"
            )
        parameter = stored[name.rpartition(".")[2]]
    flat = parameter.detach().reshape(-1)
    step = len(flat) // _SAMPLES | 1  # odd, to go through all columns
    return flat[::step].cpu()


def _bytes(values: Tensor) -> bytes:
    """Return the bytes of a tensor on the CPU."""
    return values.contiguous().view(torch.uint8).numpy().tobytes() if values.numel() else b""
