"""The arguments of `BaseEditor`'s ways to edit, with one meaning in both generations of EasyEdit.

Each generation takes any keyword, and drops those that it does not read. Here they are brought into
the form that the found one reads; what it cannot do is refused before anything is done.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

from baft_easyedit.easyedit.host import Generation
from baft_easyedit.files.messages import short
from baft_easyedit.training.requests import EditRequest, as_requests

_ALIGNED = ("target_new", "ground_truth", "target_neg", "rephrase_prompts", "subject")
"""Lists with one entry for each prompt."""
_PROBES = ("locality_inputs", "portability_inputs")
_LISTS = ("prompts", *_ALIGNED, *_PROBES, "loc_prompts", "verbose")
_SCORING = ("test_generation", "eval_metric", "metric_kwargs", "pre_file", "pre_edit", "verbose")
_READ: dict[Generation, dict[str, tuple[str, ...]]] = {
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
"""What each way to edit reads, or is given here, beside whether its edits are kept."""
_PERPLEXITIES = ("ppl", "ood_ppl")
"""Values of `eval_metric` that are not names of the accuracy of tokens."""
_ONE_BY_ONE = ("edit", "edit_requests", "generate_edit")


class EditCall(NamedTuple):
    """A call of one of `BaseEditor`'s ways to edit."""

    parts: tuple[dict[str, Any], ...]
    """The arguments by name, as the found EasyEdit reads them, of the calls that make it up."""
    keeps: bool
    """Whether the edits stay in the model."""


def read_call(
    original: Callable[..., Any],
    generation: Generation,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    batch_size: int,
) -> EditCall:
    """Say what a call means.

    Edits are kept if `sequential_edit` says so. Where only `keep_original_weight` is given, they
    are if it is false. Without both, they are kept by the release, and not by the current EasyEdit.

    Args:
        original: The method of `BaseEditor`.
        generation: EasyEdit's generation.
        args: The caller's positional arguments.
        kwargs: The caller's keyword arguments.
        batch_size: That of the hyper-parameters.

    Raises:
        ValueError: If a value breaks a rule of `request_arguments`, or EasyEdit cannot do what an
            argument asks for.
        TypeError: If a value has the wrong type, or an argument would be dropped.
    """
    name, given = original.__name__, _named(original, args, kwargs)
    sequential, undoes = given.pop("sequential_edit", None), given.pop("keep_original_weight", None)
    keeps = generation == "pypi" if undoes is None else not undoes
    keeps = keeps if sequential is None else bool(sequential)
    given.pop("train_ds", None)  # of in-context methods
    _check_read(name, generation, given)
    if name in _ONE_BY_ONE and batch_size != 1:
        raise ValueError(
            f"batch_size must be 1 for {name}(), which learns one request at a time; got "
            f"{batch_size}: use batch_edit(), or set it to 1 in the hyper-parameters"
        )
    if "prompts" in given:
        given = request_arguments(given)
    if "requests" in given:
        given["requests"] = _complete(given["requests"])
    if generation == "current":
        return EditCall(({**given, "sequential_edit": keeps},), keeps)
    given.pop("target_neg", None)  # which our methods do not read
    given["keep_original_weight"] = not keeps
    if name != "batch_edit":
        return EditCall((given,), keeps)
    parts = _chunks(given, batch_size)  # of several, the release returns the scores of the last
    return EditCall(tuple(map(_for_batch_edit, parts)), keeps)


def _chunks(given: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Divide arguments into those of at most `size` prompts each."""
    for start in range(0, len(given["prompts"]), size):
        part = slice(start, start + size)
        chunk = dict(given)
        for name in ("prompts", *_ALIGNED, "loc_prompts"):
            if name in given:
                chunk[name] = given[name][part]
        for name in _PROBES:
            if name in given:
                chunk[name] = {
                    kind: {key: values[part] for key, values in probe.items()}
                    for kind, probe in given[name].items()
                }
        yield chunk


def _for_batch_edit(given: Mapping[str, Any]) -> dict[str, Any]:
    """Rename what the release's `batch_edit` hands on as if its parameters were those of `edit`."""
    own = {"locality_inputs": "locality_prompts", "portability_inputs": "locality_ground_truth"}
    return {own.get(name, name): value for name, value in given.items()}


def _named(
    original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all arguments by their names.

    Raises:
        TypeError: If there are too many, or one is given twice.
    """
    positional = dict(inspect.signature(original).bind_partial(None, *args).arguments)
    del positional["self"]
    twice = [name for name in positional if name in kwargs]
    if twice:
        raise TypeError(f"{original.__name__}() got multiple values for argument {twice[0]!r}")
    return {**positional, **kwargs}


def _check_read(name: str, generation: Generation, given: dict[str, Any]) -> None:
    """Raise unless EasyEdit reads every argument; take out what asks for what it does anyway."""
    read, metric = _READ[generation][name], given.get("eval_metric")
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


def _complete(requests: Any) -> list[dict[str, Any]]:
    """Check request dicts, and add what EasyEdit reads without asking."""
    dicts = [requests] if isinstance(requests, Mapping) else list(requests)
    as_requests(dicts)
    defaults: dict[str, Any] = {"ground_truth": None, "locality": {}, "portability": {}}
    return [{**defaults, **request} for request in dicts]


def request_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the arguments that requests are made of, and bring them into their fullest form.

    One text becomes a list, any sequence too; what is None is left out, as EasyEdit's default; too
    few `loc_prompts` are repeated in turn.

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
    if not prompts:
        raise ValueError("prompts must hold at least one prompt; got none")
    for name in _ALIGNED:
        if name in full:
            full[name] = _aligned(full[name], name, prompts)
    for name in _PROBES:
        if name in full:
            full[name] = _probes(full[name], name, prompts)
    if "loc_prompts" in full:
        full["loc_prompts"] = _repeated(_as_list(full["loc_prompts"], "loc_prompts"), prompts)
    for i, prompt in enumerate(prompts):
        own = {"prompt": prompt, "target_new": full["target_new"][i]}
        own |= {k: full[f"{k}s"][i] for k in ("loc_prompt",) if f"{k}s" in full}
        about = full["subject"][i] if "subject" in full else None
        EditRequest.from_dict({**own, "subject": about})
        if about is not None and about not in prompt:
            raise ValueError(
                f"subject must be in the Unicode form of its prompt; {short(about)} is in another "
                f"than {short(prompt)}: bring both to one by unicodedata.normalize"
            )
    return full


def _as_list(values: Any, name: str) -> list[Any]:
    """Return one text, or several, as a list."""
    if isinstance(values, str):
        return [values]
    if not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a text or a list of texts; got {type(values).__name__}")
    return list(values)


def _aligned(values: Any, name: str, prompts: Sequence[str]) -> list[Any]:
    """Return a list with an entry for each prompt."""
    full = _as_list(values, name)
    if len(full) != len(prompts):
        raise ValueError(
            f"{name} must have one entry for each prompt; got {len(full)} for {len(prompts)} "
            "prompts"
        )
    if name == "subject" and None in full:
        raise TypeError("subject must be given for each prompt, or for none; got None in a list")
    return full


def _probes(probes: Any, name: str, prompts: Sequence[str]) -> dict[str, Any]:
    """Return locality or portability inputs of the caller's as ones that may be changed."""
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
            full[kind][key] = _aligned(probe[key], f"{name}[{kind!r}][{key!r}]", prompts)
    return full


def _repeated(texts: list[Any], prompts: Sequence[str]) -> list[Any]:
    """Return an irrelevant text for each prompt."""
    if not 1 <= len(texts) <= len(prompts):
        raise ValueError(
            f"loc_prompts must have at least one entry, and at most one for each prompt; got "
            f"{len(texts)} for {len(prompts)} prompts"
        )
    return list(islice(cycle(texts), len(prompts)))
