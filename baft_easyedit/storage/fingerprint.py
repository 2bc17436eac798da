"""A fingerprint of a model, by which `load` and `attach` recognise the model of an edit."""

import hashlib
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from baft_easyedit.files.reading import taken

_SAMPLES = 1024
"""About how many values of each parameter are hashed."""


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of a model's parameters: names, shapes, dtypes, and about 1024 values of each.

    It is equal on every device, also where accelerate offloads the weights. Adapters such as PEFT's
    LoRA change it, as the model computes with them; so does the dtype. `torch.compile` does not.

    The values are taken in even steps through all rows and columns. It misses changes of a few
    single weights between them, of buffers, of the code, and of settings that are no weights, such
    as an adapter's scale.
    """

    num_parameters: int
    """Number of parameter tensors."""
    names: str
    """SHA-256 of the parameters' names and shapes."""
    dtypes: str
    """The parameters' dtypes, such as `float32`."""
    values: str
    """SHA-256 of the sampled values."""
    rounded_values: str
    """SHA-256 of the samples rounded to bf16; the same for one model loaded in two precisions."""

    @classmethod
    def of(cls, model: nn.Module) -> "Fingerprint":
        """Compute the fingerprint of a model.

        Raises:
            ValueError: If a parameter is on the meta device, and its values are not offloaded.
        """
        names, values, rounded = (hashlib.sha256() for _ in range(3))
        parameters = dict(model.named_parameters())  # tied ones once
        for name, parameter in parameters.items():
            names.update(f"{name.replace('_orig_mod.', '')}{tuple(parameter.shape)};".encode())
            sample = _sample(model, name, parameter)
            values.update(_bytes(sample))
            rounded.update(_bytes(sample.bfloat16() if sample.is_floating_point() else sample))
        dtypes = {str(p.dtype).removeprefix("torch.") for p in parameters.values()}
        return cls(
            num_parameters=len(parameters),
            names=names.hexdigest(),
            dtypes=", ".join(sorted(dtypes)),
            values=values.hexdigest(),
            rounded_values=rounded.hexdigest(),
        )

    @classmethod
    def from_json(cls, content: dict[str, Any], where: str) -> "Fingerprint":
        """Read a JSON object of the fields; ValueError if a field is missing or of another type."""
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


def _sample(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """Return some values of a parameter, on the CPU."""
    if parameter.is_meta:
        path, _, own = name.rpartition(".")
        hook = getattr(model.get_submodule(path), "_hf_hook", None)
        stored = getattr(hook, "weights_map", None)
        if stored is None:
            raise ValueError(
                f"the model's weights must be in memory; {name} is on the meta device: load the "
                "model with its weights"
            )
        parameter = stored[own]
    flat = parameter.detach().reshape(-1)
    step = len(flat) // _SAMPLES | 1  # odd, as an even step would skip columns of an even width
    return flat[::step].cpu()


def _bytes(values: Tensor) -> bytes:
    """Return the bytes of a tensor on the CPU."""
    return values.contiguous().view(torch.uint8).numpy().tobytes() if values.numel() else b""
