"""Adapter for SGLang: its option `--forward-hooks` takes JSON, which names our `factory` of hooks.

SGLang calls a decoder layer as `layer(positions, hidden, forward_batch, residual)`. The layer
returns `(hidden, residual)`, whose sum is its output; the tokens of all requests are concatenated.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from baft_easyedit.engines.served import added, delta, read_edit, window
from baft_easyedit.model.hooks import ModelEdit

FACTORY = f"{__name__}:factory"


def specification(directory: str, edit: ModelEdit) -> list[dict[str, Any]]:
    """Return the value of `--forward-hooks` (to be JSON): one hook for each edited layer."""
    return [
        {
            "name": f"baft-{layer}",
            "target_modules": [f"model.layers.{layer}"],
            "hook_factory": FACTORY,
            "config": {"directory": directory, "layer": layer},
        }
        for layer in edit.layers
    ]


def factory(config: Mapping[str, Any]) -> Callable[[Any, tuple[Any, ...], Any], Any]:
    """Return the forward hook of one decoder layer, by a `config` of `specification`.

    Raises:
        FileNotFoundError: If the directory keeps no edit.
        ValueError: If the state is damaged.
    """
    edit, layer = read_edit(config["directory"]), config["layer"]

    def hook(_module: Any, args: tuple[Any, ...], output: Any) -> Any:
        hidden, residual = output
        here = _edited_rows(edit, args, hidden)
        if here is None:
            return output
        changed = hidden.clone()
        whole = hidden[here] + residual[here]
        changed[here] = added(hidden[here], delta(edit, layer, whole))
        return changed, residual

    return hook


def _edited_rows(edit: ModelEdit, args: tuple[Any, ...], hidden: Tensor) -> Tensor | None:
    """Return which rows of a batch are edited, [N]; None if the batch is empty."""
    batch = next((value for value in args if hasattr(value, "forward_mode")), None)
    if batch is None:
        raise RuntimeError("the layer was called without its ForwardBatch: edits cannot be served")
    if batch.forward_mode.is_idle():
        return None
    if batch.forward_mode.is_decode():
        return torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    lengths, prefixes = batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu
    if lengths is None or prefixes is None or any(prefixes):
        raise RuntimeError(
            "an edit must see a prompt whole, and this batch has a part of one: start SGLang with "
            "--disable-radix-cache --chunked-prefill-size -1, without speculative decoding"
        )
    edited = window(edit, lengths)
    edited += [False] * (len(hidden) - len(edited))  # rows of padding
    return torch.tensor(edited, device=hidden.device)
