"""Score many requests by one call of EasyEdit's evaluator.

Its functions take one prompt or a list of them, which they compute in one batch. A joint request
has a list wherever a request has one text; what EasyEdit returns of it is taken apart again.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from baft_easyedit.model.batching import alike
from baft_easyedit.model.inspect import text_config

Request = Mapping[str, Any]

logger = logging.getLogger(__name__)

SECTIONS = ("locality", "portability")
"""Parts of a request that hold probes: under each key prompts and their answers."""

_ROUTE_BATCHES = ("WISE", "GRACE", "MELO")
"""Methods, by EasyEdit's names, that route a whole batch by one of its prompts, or count its
padding."""


def as_list(value: Any) -> list[Any]:
    """Return one text, or several, as a list."""
    return [value] if isinstance(value, str) else list(value)


def rows_are_independent(alg_name: str) -> bool:
    """Tell whether a method's edited model answers each prompt of a batch as it would alone."""
    return alg_name not in _ROUTE_BATCHES


def padding_is_harmless(model: nn.Module) -> bool:
    """Tell whether texts score the same behind padding.

    EasyEdit's evaluator pads on the left and gives no positions: a model that has learned its
    positions by number, such as GPT-2, sees the text further right then.
    """
    config = text_config(model)
    rotary = ("rope_parameters", "rope_theta", "rotary_dim", "rotary_pct")
    return any(getattr(config, name, None) is not None for name in rotary)


def score_jointly(
    score: Callable[[Request], dict[str, Any]],
    requests: Sequence[Request],
    tok: Any,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Score requests, those of about one length together; alone where that fails.

    Args:
        score: EasyEdit's evaluator.
        requests: What is scored.
        tok: The tokenizer, which tells lengths.
        batch_size: Most requests that are scored at once.
    """
    scores: dict[int, dict[str, Any]] = {}
    sizes = [_length(request, tok) for request in requests]
    for group in alike(sizes, [bool(request.get("rephrase_prompt")) for request in requests]):
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            found = _scored_together(score, [requests[i] for i in part])
            scores |= dict(zip(part, found, strict=True))
    return [scores[i] for i in range(len(requests))]


def _length(request: Request, tok: Any) -> int:
    """Return the number of tokens of a request's longest prompt."""
    prompts = [request["prompt"], request.get("rephrase_prompt") or ""]
    for section in SECTIONS:
        for probe in (request.get(section) or {}).values():
            prompts += as_list(probe["prompt"])
    return max(len(ids) for ids in tok(prompts)["input_ids"])


def _scored_together(
    score: Callable[[Request], dict[str, Any]], requests: Sequence[Request]
) -> list[dict[str, Any]]:
    """Score requests as one; one by one if there is no memory for that, or no score for each."""
    if len(requests) > 1:
        try:
            return taken_apart(score(joint_request(requests)), requests)
        except (torch.cuda.OutOfMemoryError, ValueError) as error:
            logger.info("%d requests are scored one by one: %s", len(requests), error)
    return [score(request) for request in requests]


def joint_request(requests: Sequence[Request]) -> dict[str, Any]:
    """Put requests together into one; all have a rephrasing, or none."""
    texts = ["prompt", "target_new", "ground_truth"]
    if requests[0].get("rephrase_prompt"):
        texts.append("rephrase_prompt")
    joint: dict[str, Any] = {name: [request[name] for request in requests] for name in texts}
    for section in SECTIONS:
        keys = dict.fromkeys(key for r in requests for key in r.get(section) or {})
        joint[section] = {
            key: {
                part: [text for r in requests for text in _probe_texts(r, section, key, part)]
                for part in ("prompt", "ground_truth")
            }
            for key in keys
        }
    return joint


def _probe_texts(request: Request, section: str, key: str, part: str) -> list[Any]:
    """Return a request's probes under a key; none if it has no such key."""
    probe = (request.get(section) or {}).get(key)
    return [] if probe is None else as_list(probe[part])


def taken_apart(metrics: Mapping[str, Any], requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Return each request's share of what EasyEdit's `compute_edit_quality` gave for all.

    Raises:
        ValueError: If there is not one score for each prompt: EasyEdit leaves out targets that have
            no tokens.
    """
    shares: list[dict[str, Any]] = [{} for _ in requests]
    for name, value in metrics.items():
        if name.endswith("_acc"):
            parts: Iterator[Any] = _split(name, value, [1] * len(requests))
        elif name in SECTIONS:
            parts = iter(_probe_shares(name, value, requests))
        else:  # what it says of its metrics
            parts = (deepcopy(value) for _ in requests)
        for share, part in zip(shares, parts, strict=True):
            share[name] = part
    return shares


def _probe_shares(
    section: str, scores: Mapping[str, Sequence[Any]], requests: Sequence[Request]
) -> list[dict[str, Any]]:
    """Take the scores of a section apart: each key's `<key>_acc` or `<key>_output`."""
    shares: list[dict[str, Any]] = [{} for _ in requests]
    for name, values in scores.items():
        key = name.rpartition("_")[0]
        counts = [len(_probe_texts(request, section, key, "prompt")) for request in requests]
        for share, score in zip(shares, _split(name, values, counts), strict=True):
            if score:
                share[name] = score
    return shares


def _split(name: str, values: Sequence[Any], counts: Sequence[int]) -> Iterator[list[Any]]:
    """Cut a list into parts of so many entries."""
    if len(values) != sum(counts):
        raise ValueError(f"{name} must have a score for each of {sum(counts)}; got {len(values)}")
    start = 0
    for count in counts:
        yield list(values[start : start + count])
        start += count
