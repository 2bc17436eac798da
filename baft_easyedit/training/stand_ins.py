"""Stand-in prompts: the prompt of an edit with an invented name in its subject's place (ours).

They show what the prompts of a form have in common, whatever their subject. With `min_similarity`,
the mean of the states at their last tokens is the centre from which similarity to the state at the
edit's last prompt token is measured (see `method.past_edits`). Without it, they are irrelevant
prompts for a request that brings none: an edit of France's capital, learned without any, gives
Germany the same one, and the gates are to tell subjects apart. As the names are invented, no
stand-in asks for a true fact, nor for one that was edited before.

Shapes: N stand-ins of all rows, D hidden size.
"""

import random
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.model.inspect import decoder_layers, hidden_of, input_device, last_logits
from baft_easyedit.training.observing import watching
from baft_easyedit.training.requests import EditRequest, TextRow, same_form

NUM_CENTRED = 8
"""Stand-ins that a centre is the mean of; of 4 it keeps fewer other prompts, of 16 no more."""
_MOST_AT_ONCE = 32
"""Stand-ins that are read at once, of several edits that are learned side by side."""

_NAMES = (
    *("Velmora", "Tarkesh", "Orlundia", "Brisken", "Port Halden", "Sarnath Vale"),  # places
    *("Lake Ondra", "Mount Serrin", "Tolva River", "Castle Grennock", "Bellweather Tower"),
    *("Milton Grebe", "Anna Torvalsen", "Teodora Vance", "Lin Qiaoya", "Dmitri Volsky"),  # people
    *("Samuel Oduya", "Rafael Quintero Sosa", "Yuki Tanemura", "Greta Brandlmeier"),
    *("The Glass Orchard", "A Winter in Helm", "Nightfall over Tessin", "Kestrel Nine"),  # works
    *("Norvex", "Calderon Motors", "Blue Heron Press", "Hartwell College", "Kingsbridge Rovers"),
    *("velmite", "korvash stew", "the marsh lynx", "harrowflute", "dunball"),  # things
)


def stand_ins(request: EditRequest, count: int = NUM_CENTRED) -> list[str]:
    """Return prompts with other names in the place of a request's subject.

    Args:
        request: The request; without a subject it gets none.
        count: How many, at most.

    Returns:
        The stand-ins; the same prompt always gets the same ones.
    """
    if request.subject is None:
        return []
    prompt, subject = request.prompt, request.subject
    if subject not in prompt:  # in another form of Unicode
        prompt, subject = same_form(prompt), same_form(subject)
    names = random.Random(same_form(prompt)).sample(_NAMES, min(count + 1, len(_NAMES)))
    whole_words = re.compile(rf"(?<!\w){re.escape(subject)}(?!\w)")
    place = whole_words if whole_words.search(prompt) else re.compile(re.escape(subject))
    return [place.sub(name, prompt) for name in names if name not in prompt][:count]


@torch.no_grad()
def centres(model: nn.Module, edit: ModelEdit, rows: Sequence[TextRow]) -> list[dict[int, Tensor]]:
    """Return the mean states at the last tokens of stand-ins, at each layer of an edit.

    Args:
        model: The model, in eval mode.
        edit: The edit, which is off meanwhile.
        rows: Rows of edits.

    Returns:
        The mean for each row by layer, [1, D], fp32; [0, D] for a row without stand-ins.

    Raises:
        FloatingPointError: If a state is not finite.
    """
    texts = [torch.tensor(ids) for row in rows for ids in row.stand_ins]
    last = _last_states(model, edit, texts)
    if not all(bool(states.isfinite().all()) for states in last.values()):
        raise FloatingPointError(
            "hidden states of the prompt with other subjects must be finite, and are not: the edit "
            "was undone; load the model in a wider dtype, or leave out the subject"
        )
    counts = [len(row.stand_ins) for row in rows]
    parts = {layer: torch.split(states, counts) for layer, states in last.items()}
    return [
        {layer: own[i].mean(0, keepdim=True)[: counts[i]] for layer, own in parts.items()}
        for i in range(len(rows))
    ]


def _last_states(model: nn.Module, edit: ModelEdit, texts: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return the states at the last tokens of texts by layer, [N, D] each."""
    stack, device = decoder_layers(model), input_device(model)
    found = {i: [edit.intervention(i).basis.detach()[:0].float()] for i in edit.layers}
    for start in range(0, len(texts), _MOST_AT_ONCE):
        part = texts[start : start + _MOST_AT_ONCE]
        ids = pad_sequence([*part], batch_first=True).to(device)
        mask = pad_sequence([torch.ones_like(text) for text in part], batch_first=True).to(device)
        with edit.disabled(), watching([stack[layer] for layer in edit.layers]) as seen:
            model(input_ids=ids, attention_mask=mask, use_cache=False, **last_logits(model))
        last = [len(text) - 1 for text in part]
        for states, (output,) in zip(found.values(), seen, strict=True):
            hidden = hidden_of(output)[:, -ids.shape[1] :]  # without PEFT's virtual tokens
            states.append(hidden[range(len(part)), last].float())
    return {layer: torch.cat(states) for layer, states in found.items()}
