"""Adapter for vllm-lens (1.2.1; vLLM from 0.16 on, the V1 runner): an edit as a `Hook`.

vllm-lens calls a hook for each request and layer with the layer's whole output (hidden states plus
residual), and writes the change back. A hook does not get the positions of its tokens, so we take
the first call for a layer as the whole prompt, and later calls as generated tokens.
"""

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from baft_easyedit.engines.served import added, delta, read_edit
from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.model.positions import first_edited


def edited(edit: ModelEdit, context: Any, hidden: Tensor) -> Tensor:
    """Edit the tokens of one request in one forward pass of one layer, [N, D] -> [N, D].

    Raises:
        RuntimeError: If a prompt comes in parts; vllm-lens logs the error and does not edit.
    """
    layer, first = context.layer_idx, 0
    key = f"baft_prompt_{layer}"
    if key not in context.saved:
        context.saved[key] = len(hidden)
        first = first_edited(len(hidden), edit.num_prompt_positions)
    elif len(hidden) > 1:
        raise RuntimeError(
            f"layer {layer} got {len(hidden)} tokens of a request after its first pass, and an "
            "edit must see a prompt whole: turn chunked prefill and speculative decoding off, "
            "and give the cache room (a request that is preempted is computed again)"
        )
    rows = hidden[first:]
    return torch.cat([hidden[:first], added(rows, delta(edit, layer, rows))])


def hooks(directory: str | os.PathLike[str]) -> list[Any]:
    """Return a kept edit as a list of one `vllm_lens.Hook`, for `extra_args["apply_hooks"]`.

    Raises:
        FileNotFoundError: If the directory keeps no edit.
        ValueError: If the state is damaged.
        ImportError: If vllm-lens is not installed.
    """
    from vllm_lens import Hook

    edit = read_edit(directory)
    return [Hook(fn=partial(edited, edit), layer_indices=list(edit.layers))]


def register(llm: Any, directory: str | os.PathLike[str]) -> None:
    """Make every later request of a `vllm.LLM` use a kept edit.

    Raises:
        ValueError: If the engine splits prompts (chunked prefill); others as `hooks`.
    """
    if llm.llm_engine.vllm_config.scheduler_config.enable_chunked_prefill:
        raise ValueError(
            "enable_chunked_prefill must be False, for the edit must see a prompt whole; got True: "
            "LLM(..., enable_chunked_prefill=False)"
        )
    llm.register_hooks(hooks(directory))
