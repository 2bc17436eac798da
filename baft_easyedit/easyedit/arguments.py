"""Give the arguments of `BaseEditor`'s editing methods one meaning in both generations of EasyEdit.

Each generation accepts any keyword, and silently drops those that it does not read. `read_call`,
which `base_editor` calls before each edit, translates a user's arguments into those that the found
generation reads. It raises, before anything is changed, if an argument cannot be honoured.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import cycle, islice
from typing import Any

from baft_easyedit.easyedit.host import Generation
from baft_easyedit.files.messages import short
from baft_easyedit.training.requests import EditRequest, as_requests

_ALIGNED = ("target_new", "ground_truth", "target_neg", "rephrase_prompts", "subject")
"""Lists with one entry for each prompt."""
_PROBES = ("locality_inputs", "portability_inputs")
_LISTS = ("prompts", *_ALIGNED, *_PROBES, "loc_prompts", "verbose")
_SCORING = ("test_generation", "eval_metric", "metric_kwargs", "pre_file", "pre_edit", "verbose")
READ: dict[Generation, dict[str, tuple[str, ...]]] = {
    "current": {
        "edit": (*_LISTS, *_SCORING),
        "edit_requests": ("requests", *_SCORING),
        "batch_edit": (*_LISTS, "test_generation"),
        "generate_edit": (*_LISTS, "test_generation", "pre_edit"),
        "normal_edit": ("prompts", "target_new"),
        "edit_dataset": ("ds", "verbose"),  # which some commits have
    },
    "pypi": {
        "edit": (*_LISTS, "test_generation"),
        "edit_requests": ("requests", "test_generation", "eval_metric", "verbose"),
        "batch_edit": (*_LISTS, "test_generation"),
        "edit_dataset": ("ds", "verbose"),
    },
}
"""Arguments that each editing method reads, or this package for it; not whether edits are kept."""
_PERPLEXITIES = ("ppl", "ood_ppl")
"""Values of `eval_metric` that ask for a perplexity; all others mean token accuracy."""
_ONE_BY_ONE = ("edit", "edit_requests", "generate_edit")


def read_call(
    original: Callable[..., Any],
    generation: Generation,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    batch_size: int,
) -> tuple[list[dict[str, Any]], bool]:
    """Translate a user's call of one of `BaseEditor`'s editing methods.

    Edits are kept if `sequential_edit` is true. If only `keep_original_weight` is given, they are
    kept if that is false. Without either, the release keeps them and the current EasyEdit does not.

    Returns:
        The calls to make instead, each as the arguments, by name, that the found EasyEdit reads;
        and whether the edits stay in the model.

    Raises:
        ValueError: If a value breaks a rule of `request_arguments`, or EasyEdit cannot do what an
            argument asks for.
        TypeError: If a value has the wrong type, or an argument would be dropped.
    """
    name, given = original.__name__, _named(original, args, kwargs)
    sequential, undoes = given.pop("sequential_edit", None), given.pop("keep_original_weight", None)
    keeps = generation == "pypi" if undoes is None else not undoes
    keeps = keeps if sequential is None else bool(sequential)
    given.pop("train_ds", None)  # only in-context methods read it
    _check_read(name, generation, given)
    if name in _ONE_BY_ONE and batch_size != 1:
        raise ValueError(
            f"batch_size must be 1 for {name}(), which learns one request at a time; got "
            f"{batch_size}: use batch_edit(), or set it to 1 in the hyper-parameters"
        )
    if "prompts" in given:
        given = request_arguments(given)
    if "requests" in given:
        requests = given["requests"]
        dicts = [requests] if isinstance(requests, Mapping) else list(requests)
        as_requests(dicts)
        defaults: dict[str, Any] = {"ground_truth": None, "locality": {}, "portability": {}}
        given["requests"] = [{**defaults, **request} for request in dicts]
    if generation == "current":
        return [{**given, "sequential_edit": keeps}], keeps
    given.pop("target_neg", None)  # our methods do not read it
    given["keep_original_weight"] = not keeps
    # Given several chunks, the release's `batch_edit` returns the scores of the last one alone.
    return list(_chunks(given, batch_size)) if name == "batch_edit" else [given], keeps


def _chunks(given: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Split a call of the release's `batch_edit` into calls of at most `size` prompts each."""
    # `batch_edit` passes these two on by position, to parameters that have `edit`'s names.
    own = {"locality_inputs": "locality_prompts", "portability_inputs": "locality_ground_truth"}
    for start in range(0, len(given["prompts"]), size):
        part = slice(start, start + size)
        chunk = {}
        for name, value in given.items():
            if name in ("prompts", *_ALIGNED, "loc_prompts"):
                value = value[part]
            elif name in _PROBES:
                value = {
                    kind: {key: values[part] for key, values in probe.items()}
                    for kind, probe in value.items()
                }
            chunk[own.get(name, name)] = value
        yield chunk


def _named(
    original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all arguments by their names."""
    positional = dict(inspect.signature(original).bind_partial(None, *args).arguments)
    del positional["self"]
    twice = [name for name in positional if name in kwargs]
    if twice:
        raise TypeError(f"{original.__name__}() got multiple values for argument {twice[0]!r}")
    return {**positional, **kwargs}


def _check_read(name: str, generation: Generation, given: dict[str, Any]) -> None:
    """Raise unless EasyEdit reads all arguments; drop an `eval_metric` that changes nothing."""
    read, metric = READ[generation][name], given.get("eval_metric")
    where = f"{name}() of this EasyEdit ({generation})"
    is_possible = "eval_metric" in read and (generation, metric) != ("pypi", "ood_ppl")
    if metric in _PERPLEXITIES and not is_possible:
        raise ValueError(
            f"eval_metric must be a token accuracy in {where}; got {metric!r}: use "
            "edit_requests(), or a current clone of EasyEdit"
        )
    if "eval_metric" not in read:
        given.pop("eval_metric", None)
    unknown = [argument for argument in given if argument not in read]
    if unknown:
        raise TypeError(
            f"{where} does not read {unknown[0]!r}; it reads "
            f"{', '.join((*dict.fromkeys(read), 'sequential_edit'))}"
        )


def prepare_requests(requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Complete copies of request dicts with keys that EasyEdit reads without checking for them.

    Missing `ground_truth`, `case_id`, `locality` and `portability` are added; probes without a
    prompt are dropped.
    """
    complete = []
    for i, request in enumerate(requests):
        item = {"ground_truth": None, "case_id": i, **deepcopy(dict(request))}
        for section in ("locality", "portability"):
            probes = item.get(section) or {}
            item[section] = {k: v for k, v in probes.items() if v and v.get("prompt")}
        complete.append(item)
    return complete


def request_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the arguments that requests are made of, and complete them.

    A single text, and any sequence, becomes a list; arguments that are None, EasyEdit's default,
    are left out; if there are fewer `loc_prompts` than prompts, they are repeated in turn.

    Args:
        given: `prompts` and `target_new`; `ground_truth`, `target_neg`, `rephrase_prompts` and
            `subject`, one for each prompt; `loc_prompts`, at most one for each; in
            `locality_inputs` and `portability_inputs`, for each name, `prompt` and `ground_truth`
            with an entry for each. Others are left as they are.

    Raises:
        ValueError: If there is no prompt, a list has another length, a prompt or target is empty,
            or a subject is not a part of its prompt, letter for letter, which EasyEdit asserts.
        TypeError: If a value has the wrong type.
    """
    full = {name: value for name, value in given.items() if value is not None}
    if "target_new" not in full:
        raise TypeError("target_new must be given: one target for each prompt")
    prompts = full["prompts"] = _as_list(given["prompts"], "prompts")
    count = len(prompts)
    if not prompts:
        raise ValueError("prompts must hold at least one prompt; got none")
    for name in set(_ALIGNED) & full.keys():
        full[name] = _as_list(full[name], name, count)
    for name in set(_PROBES) & full.keys():
        full[name] = _probes(full[name], name, count)
    if "loc_prompts" in full:
        texts = _as_list(full["loc_prompts"], "loc_prompts")
        if not 1 <= len(texts) <= count:
            raise ValueError(
                f"loc_prompts must have at least one entry, and at most one for each prompt; got "
                f"{len(texts)} for {count} prompts"
            )
        full["loc_prompts"] = list(islice(cycle(texts), count))
    subjects = full.get("subject", [None] * count)
    if "subject" in full and None in subjects:
        raise TypeError("subject must be given for each prompt, or for none; got None in a list")
    for i, (prompt, about) in enumerate(zip(prompts, subjects, strict=True)):
        own = {"prompt": prompt, "target_new": full["target_new"][i], "subject": about}
        if "loc_prompts" in full:
            own["loc_prompt"] = full["loc_prompts"][i]
        EditRequest.from_dict(own)
        if about is not None and about not in prompt:
            raise ValueError(
                f"subject must be in the Unicode form of its prompt; {short(about)} is in another "
                f"than {short(prompt)}: bring both to one by unicodedata.normalize"
            )
    return full


def _as_list(values: Any, name: str, count: int | None = None) -> list[Any]:
    """Return a text or a sequence of texts as a list, checked to have `count` entries, if given."""
    if not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a text or a list of texts; got {type(values).__name__}")
    full = [values] if isinstance(values, str) else list(values)
    if count is not None and len(full) != count:
        raise ValueError(
            f"{name} must have one entry for each prompt; got {len(full)} for {count} prompts"
        )
    return full


def _probes(probes: Any, name: str, count: int) -> dict[str, Any]:
    """Check the caller's locality or portability inputs, and return a copy that may be changed."""
    if not isinstance(probes, Mapping) or not all(isinstance(p, Mapping) for p in probes.values()):
        raise TypeError(
            f"{name} must be a dict of dicts with the keys 'prompt' and 'ground_truth'; got "
            f"{type(probes).__name__}"
        )
    full: dict[str, Any] = {}
    for kind, probe in probes.items():
        full[kind] = dict(probe)
        for key in ("prompt", "ground_truth"):
            if key not in probe:
                raise ValueError(f"{name}[{kind!r}] must have the key {key!r}")
            full[kind][key] = _as_list(probe[key], f"{name}[{kind!r}][{key!r}]", count)
    return full
