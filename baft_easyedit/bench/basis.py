"""Record what an edited model's gate does on a case: basis weights, and each basis's update.

`worker` records them after all edits of a chunk, for Figures 1 and 2 of the paper and `diagnose`.
Shapes: r rank, N intervened positions of one text.
"""

from collections.abc import Mapping
from typing import Any

import torch

from baft_easyedit.bench.questions import questions_of
from baft_easyedit.model.hooks import ModelEdit, attached_edit
from baft_easyedit.model.prompt_format import PromptFormat
from baft_easyedit.training.prefix_cache import FullForward
from baft_easyedit.training.requests import TextRow

LayerValues = dict[str, list[float]]
"""One number for each basis, by layer; the layers are texts, as JSON needs for keys."""
NO_RECORD = {"basis": None, "update": None}


def basis_record(
    model: Any, tok: Any, request: Mapping[str, Any], prompt_format: PromptFormat | None = None
) -> Mapping[str, Any]:
    """Record the gate on a case's prompt, rephrasing and locality probes, each with its answer.

    Returns:
        `basis` and `update`, each with `rewrite`, `rephrase` and `locality`: by layer, w_k and
        |w_k (v_k - (R h)_k)|, averaged over intervened positions and probes; None for a kind of
        prompt that the case lacks. None for both if the model carries no edit.
    """
    edit = attached_edit(model)
    if edit is None:
        return NO_RECORD
    form, asked = prompt_format or PromptFormat(), questions_of(request)
    kinds = ("rewrite", "rephrase", "locality")
    texts = {k: [(q.prompt, q.answer) for q in asked if q.section == k and q.answer] for k in kinds}
    seen = {k: _observe(model, tok, edit, pairs, form) for k, pairs in texts.items() if pairs}
    return {
        name: {kind: seen[kind][i] if kind in seen else None for kind in kinds}
        for i, name in enumerate(NO_RECORD)
    }


@torch.no_grad()
def _observe(
    model: Any, tok: Any, edit: ModelEdit, pairs: list[tuple[str, str]], form: PromptFormat
) -> tuple[LayerValues, LayerValues]:
    """Run texts of one kind; return mean weight and mean size of the update of each basis."""
    rows = [
        TextRow(form.whole_ids(*pair, tok), len(form.prompt_ids(pair[0], tok)), is_edit=True)
        for pair in pairs
    ]
    forward = FullForward(model, edit).prepare([rows])
    with edit.recording() as record:
        forward()
    assert record.positions is not None  # a forward of tokens has set them
    weights, update = {}, {}
    for layer, values in record.weights_of(slice(None)).items():
        hidden = record.hidden[layer]
        edited = hidden[record.positions.to(hidden.device)].float()  # [N, D]
        sizes = (values * edit.intervention(layer).step(edited)).abs()  # [N, r]
        weights[str(layer)] = values.mean(0).tolist()
        update[str(layer)] = sizes.mean(0).tolist()
    return weights, update


def basis_usage(model: Any) -> LayerValues | None:
    """Return the mean weight of each basis over all edits so far, by layer; None without edit."""
    edit = attached_edit(model)
    if edit is None:
        return None
    return {
        str(i): (edit.usage(i).total / edit.usage(i).count.clamp_min(1)).tolist()
        for i in edit.layers
    }
