"""Record what an edited model's gate does on a case: basis weights, and each basis's update.

`worker` records them after all edits of a chunk, for Figures 1 and 2 of the paper and `diagnose`.
Shapes: r rank, N intervened positions of one text.
"""

from collections.abc import Mapping
from typing import Any

import torch

from baft_easyedit.bench.questions import questions_of
from baft_easyedit.easyedit.session import Session
from baft_easyedit.model.hooks import ModelEdit, attached_edit
from baft_easyedit.model.prompt_format import PromptFormat
from baft_easyedit.training.prefix_cache import FullForward
from baft_easyedit.training.requests import TextRow

LayerValues = dict[str, list[float]]
"""One number for each basis, by layer; the layers are texts, as JSON needs for keys."""
NO_RECORD = {"basis": None, "update": None}


def basis_record(session: Session, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Record the gate on a case's prompt, rephrasing and locality probes, each with its answer.

    Returns:
        `basis` and `update`, each with `rewrite`, `rephrase` and `locality`: by layer, w_k and
        |w_k (v_k - (R h)_k)|, averaged over intervened positions and probes; None for a kind of
        prompt that the case lacks, and for `update` where each edit has bases of its own. None for
        both if the model carries no edit.
    """
    edit = attached_edit(session.model)
    if edit is None:
        return NO_RECORD
    record: dict[str, dict[str, LayerValues | None]] = {"basis": {}, "update": {}}
    for kind in ("rewrite", "rephrase", "locality"):
        asked = [q for q in questions_of(request) if q.section == kind]
        pairs = [(q.prompt, q.answer) for q in asked if q.answer]
        seen = _observe(session, edit, pairs) if pairs else (None, None)
        record["basis"][kind], record["update"][kind] = seen
    return record


@torch.no_grad()
def _observe(
    session: Session, edit: ModelEdit, pairs: list[tuple[str, str]]
) -> tuple[LayerValues, LayerValues | None]:
    """Run texts of one kind; return mean weight and mean size of the update of each basis."""
    tok, form = session.editor.tok, PromptFormat.of(session.editor.hparams)
    rows = [
        TextRow(form.whole_ids(*pair, tok), len(form.prompt_ids(pair[0], tok)), is_edit=True)
        for pair in pairs
    ]
    forward = FullForward(session.model, edit).prepare([rows])
    with edit.recording() as record:
        forward()
    assert record.positions is not None  # a forward of tokens has set them
    weights, update, is_shared = {}, {}, edit.min_similarity is None
    for layer, values in record.weights_of(slice(None)).items():
        hidden = record.hidden[layer]
        edited = hidden[record.positions.to(hidden.device)].float()  # [N, D]
        sizes = (values * edit.intervention(layer).step(edited)).abs()  # [N, r]
        weights[str(layer)] = values.mean(0).tolist()
        update[str(layer)] = sizes.mean(0).tolist()
    return weights, update if is_shared else None


def basis_usage(model: Any) -> LayerValues | None:
    """Return the mean weight of each basis over all edits so far, by layer; None without edit."""
    edit = attached_edit(model)
    if edit is None or edit.min_similarity is not None:  # each edit has bases of its own
        return None
    return {
        str(i): (edit.usage(i).total / edit.usage(i).count.clamp_min(1)).tolist()
        for i in edit.layers
    }
