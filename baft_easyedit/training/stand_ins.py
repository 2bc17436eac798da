"""Stand-in prompts: the prompt of an edit with another name in its subject's place (ours).

They show what the prompts of a form have in common, and have two uses:

- Siblings of an edit with `min_similarity` have names that models know. The edit's first centre is
  the mean state at the last tokens of the siblings that are most similar to it, so that places are
  compared with places and people with people (see `method.past_edits`).
- Irrelevant prompts of a request that brings none have invented names, so none of them asks for a
  true fact, or for one that was edited before. Learned without them, an edit of France's capital
  gives Germany the same one; with them the gates learn to tell subjects apart.

Shapes: S siblings of a row, N texts, D hidden size.
"""

import random
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from baft_easyedit.method.whitening import Whitening
from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.model.inspect import (
    cache_name,
    decoder_layers,
    hidden_of,
    input_device,
    last_logits,
    part_behind_cache,
    repeated_cache,
)
from baft_easyedit.training.observing import is_close, tolerance_of, watching
from baft_easyedit.training.requests import EditRequest, TextRow, same_form

_NEAREST = 6
"""Siblings that a centre is the mean of."""
_MOST_AT_ONCE = 32
"""Texts that are read at once, of several edits that are learned side by side."""
_WORTH_READING = 8
"""Fewest tokens at the beginning of all texts that are read apart."""

_KNOWN = (
    *("Germany", "Peru", "Kenya", "Japan", "Egypt", "London", "Toronto", "Mumbai"),  # places
    *("Mount Everest", "the Nile"),
    *("Albert Einstein", "Marie Curie", "William Shakespeare", "Nelson Mandela"),  # people
    *("Taylor Swift", "Haruki Murakami"),
    *("Hamlet", "The Godfather", "Abbey Road"),  # works
    *("Microsoft", "Harvard University", "FC Barcelona", "gold", "the lion"),  # things
)
"""Names that models know, of many kinds. The state of an invented one is unlike any of these."""
_INVENTED = (
    *("Velmora", "Tarkesh", "Orlundia", "Brisken", "Port Halden", "Sarnath Vale"),  # places
    *("Lake Ondra", "Mount Serrin", "Tolva River", "Castle Grennock", "Bellweather Tower"),
    *("Milton Grebe", "Anna Torvalsen", "Teodora Vance", "Lin Qiaoya", "Dmitri Volsky"),  # people
    *("Samuel Oduya", "Rafael Quintero Sosa", "Yuki Tanemura", "Greta Brandlmeier"),
    *("The Glass Orchard", "A Winter in Helm", "Nightfall over Tessin", "Kestrel Nine"),  # works
    *("Norvex", "Calderon Motors", "Blue Heron Press", "Hartwell College", "Kingsbridge Rovers"),
    *("velmite", "korvash stew", "the marsh lynx", "harrowflute", "dunball"),  # things
)


def stand_ins(request: EditRequest, count: int) -> list[str]:
    """Return prompts with invented names in the place of a request's subject.

    Args:
        request: The request; without a subject it gets none.
        count: How many, at most.

    Returns:
        The stand-ins; the same prompt always gets the same ones.
    """
    choice = random.Random(same_form(request.prompt))
    return _with_names(request, choice.sample(_INVENTED, min(count, len(_INVENTED))))


def siblings(request: EditRequest) -> list[str]:
    """Return prompts with known names in the place of a request's subject, if it has one."""
    return _with_names(request, _KNOWN)


def _with_names(request: EditRequest, names: Sequence[str]) -> list[str]:
    """Return a prompt with each name that it does not have in the place of its subject."""
    if request.subject is None:
        return []
    prompt, subject = request.prompt, request.subject
    if subject not in prompt:  # in another form of Unicode
        prompt, subject = same_form(prompt), same_form(subject)
    whole_words = re.compile(rf"(?<!\w){re.escape(subject)}(?!\w)")
    place = whole_words if whole_words.search(prompt) else re.compile(re.escape(subject))
    return [place.sub(name, prompt) for name in names if name not in prompt]


@torch.no_grad()
def centres(model: nn.Module, edit: ModelEdit, rows: Sequence[TextRow]) -> list[dict[int, Tensor]]:
    """Return the centres of each row at each layer of an edit; see `method.past_edits`.

    Args:
        model: The model, in eval mode.
        edit: The edit, which is off meanwhile; it has statistics if a row has siblings.
        rows: Rows of edits.

    Returns:
        The centres for each row by layer, [2, D], fp32; [0, D] for a row without siblings.

    Raises:
        FloatingPointError: If a state is not finite.
    """
    texts = [[row.ids[: row.prompt_length], *row.siblings] for row in rows]
    states = _last_states(model, edit, [one for own in texts if len(own) > 1 for one in own])
    if not all(bool(own.isfinite().all()) for own in states.values()):
        raise FloatingPointError(
            "hidden states of the prompt with other subjects must be finite, and are not: the edit "
            "was undone; load the model in a wider dtype, or leave out the subject"
        )
    counts = [len(own) if len(own) > 1 else 0 for own in texts]
    parts = {layer: torch.split(own, counts) for layer, own in states.items()}
    return [
        {i: _centres(own[k], edit.whitening(i)) if count else own[k] for i, own in parts.items()}
        for k, count in enumerate(counts)
    ]


def _centres(states: Tensor, whitening: Whitening) -> Tensor:
    """Return the mean of the states that are most similar to the first, and that of all texts.

    Args:
        states: [1 + S, D].
        whitening: The statistics of all texts.

    Returns:
        Both means, [2, D].
    """
    own, *others = nn.functional.normalize(whitening.whitened(states), dim=-1)
    nearest = (torch.stack(others) @ own).topk(min(_NEAREST, len(others))).indices
    return torch.stack([states[1:][nearest].mean(0), whitening.mean])


def _last_states(
    model: nn.Module, edit: ModelEdit, texts: Sequence[Sequence[int]]
) -> dict[int, Tensor]:
    """Return the states at the last tokens of texts by layer, [N, D] each.

    Texts in a chat template have most of their tokens in common, which are read once. Not every
    model can read several tokens behind its cache, so the first text is read as a whole, too.
    """
    found = {i: [edit.intervention(i).basis.detach()[:0].float()] for i in edit.layers}
    layers = [decoder_layers(model)[i] for i in edit.layers]
    tolerance = tolerance_of(next(model.parameters()))
    for start in range(0, len(texts), _MOST_AT_ONCE):
        part = texts[start : start + _MOST_AT_ONCE]
        with edit.disabled():
            num_read, past = _read_beginning(model, part)
            states = _read_rest(model, layers, part, num_read, past)
            if past:
                first = _read_rest(model, layers, part[:1], 0, {})
                pairs = zip(states, first, strict=True)
                if not all(is_close(own[:1], other, tolerance) for own, other in pairs):
                    states = _read_rest(model, layers, part, 0, {})
        for known, new in zip(found.values(), states, strict=True):
            known.append(new)
    return {layer: torch.cat(states) for layer, states in found.items()}


def _read_beginning(model: nn.Module, texts: Sequence[Sequence[int]]) -> tuple[int, dict[str, Any]]:
    """Read the tokens that all texts begin with, if they are worth it and the model has a cache.

    Returns:
        How many tokens were read; and the cache by its name, for as many texts.
    """
    columns = zip(*(text[:-1] for text in texts), strict=False)
    common = [tokens[0] for tokens in takewhile(lambda tokens: len({*tokens}) == 1, columns)]
    if len(texts) == 1 or len(common) < _WORTH_READING:
        return 0, {}
    ids = torch.tensor([common], device=input_device(model))
    output = model(input_ids=ids, use_cache=True, **last_logits(model))
    name = cache_name(model)
    cache = repeated_cache(getattr(output, name, None), len(texts))
    return (0, {}) if cache is None else (len(common), {name: cache})


def _read_rest(
    model: nn.Module,
    layers: Sequence[nn.Module],
    texts: Sequence[Sequence[int]],
    num_read: int,
    past: Mapping[str, Any],
) -> list[Tensor]:
    """Read texts behind their first `num_read` tokens; return each layer's last states, [N, D]."""
    rest = [torch.tensor(text[num_read:]) for text in texts]
    ids = pad_sequence(rest, batch_first=True).to(input_device(model))
    with watching(layers) as seen:
        if past:  # no mask: in a causal model no token sees the padding behind it
            part_behind_cache(model)(input_ids=ids, use_cache=True, **past, **last_logits(model))
        else:
            mask = pad_sequence([torch.ones_like(text) for text in rest], batch_first=True)
            there = mask.to(ids.device)
            model(input_ids=ids, attention_mask=there, use_cache=False, **last_logits(model))
    rows, last = range(len(rest)), [len(text) - 1 for text in rest]
    # without PEFT's virtual tokens
    return [hidden_of(output)[:, -ids.shape[1] :][rows, last].float() for (output,) in seen]
