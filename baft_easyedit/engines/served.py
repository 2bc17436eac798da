"""Use a kept edit without its model, for serving engines: what to add to the hidden states.

Engines run their own model code, so `ModelEdit` cannot attach its hooks; the engine's adapter says
which tokens are edited. Shapes: N tokens of a flattened batch or a part of it, D hidden size.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from baft_easyedit.files.paths import expanded
from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.model.positions import first_edited
from baft_easyedit.storage.loading import edit_of
from baft_easyedit.storage.reading import read_to_use


def read_edit(directory: str | os.PathLike[str]) -> ModelEdit:
    """Read a kept edit; no model is needed.

    Raises:
        FileNotFoundError: If the directory keeps no edit.
        ValueError: If the state is damaged, or its tensors do not fit its hyper-parameters.
    """
    path = expanded(directory)
    with torch.device("cpu"):  # engines set another default while they load a model
        edit, _ = edit_of(read_to_use(path), None, str(path))
    return edit.requires_grad_(False)


@torch.no_grad()
def delta(edit: ModelEdit, layer: int, hidden: Tensor) -> Tensor:
    """Return Phi(h) - h, what an edit adds to the hidden states of edited tokens.

    Args:
        edit: A result of `read_edit`.
        layer: One of its layers.
        hidden: h, the whole output of the layer, [N, D]; if an engine keeps the residual stream
            apart, the sum of both parts.

    Returns:
        [N, D], fp32.
    """
    h, acts_everywhere = hidden.float(), edit.min_similarity is None
    edit.move(layer, hidden.device)
    edited, _ = edit.intervention(layer)(h) if acts_everywhere else edit.act(layer, h)
    return edited - h


def window(edit: ModelEdit, prompt_lengths: Sequence[int]) -> list[bool]:
    """Tell for each token of concatenated whole prompts whether it is edited."""
    firsts = ((n, first_edited(n, edit.num_prompt_positions)) for n in prompt_lengths)
    return [i >= first for n, first in firsts for i in range(n)]


def added(hidden: Tensor, delta: Tensor) -> Tensor:
    """Add an fp32 delta; the result has the dtype of `hidden`."""
    return (hidden.float() + delta).to(hidden.dtype)
