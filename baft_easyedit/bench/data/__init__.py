"""Benchmark files as EasyEdit request dicts.

No reader needs EasyEdit, a tokenizer or the network; the package brings no benchmark data but its
own facts. What is odd in the records is told in notes.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from baft_easyedit.bench.data import long_answers, questions, readers
from baft_easyedit.bench.data.files import Source, read_cases
from baft_easyedit.bench.store import FileHash
from baft_easyedit.files.messages import short
from baft_easyedit.training.requests import EditRequest

Request = dict[str, Any]

DATASETS: Mapping[str, Callable[..., Source]] = {
    "facts": readers.read_facts,
    "zsre": readers.read_zsre,
    "knowedit-zsre": partial(read_cases, readers.KnowEdit, ("ZsRE-test-all.json",)),
    "wikidata-recent": partial(read_cases, readers.KnowEdit, ("recent_test.json",)),
    "wikidata-counterfact": partial(read_cases, readers.KnowEdit, ("test_cf.json",)),
    "wikibio": partial(read_cases, readers.KnowEdit, ("wikibio-test-all.json",)),
    "convsent": long_answers.read_convsent,
    "counterfact": readers.read_counterfact,
    "mquake": questions.read_mquake,
    "wikibigedit": questions.read_wikibigedit,
    "halluedit": questions.read_halluedit,
    "unke": partial(read_cases, long_answers.Unke, ("final_data_v3.json",)),
    "akew": long_answers.read_akew,
    "requests": partial(read_cases, readers.Request, ()),
}
"""Readers by kind; each takes a path, a file or the directory of the one named here, and options by
keyword."""
_MAX_LIST = 400
"""Characters of a list of records in a note."""


class Dataset(NamedTuple):
    """Records to edit, numbered in the notes from 0, and skipped ones as in the file."""

    requests: list[Request]  # EasyEdit's request dicts, as `Case.as_request` gives them
    files: list[FileHash]
    notes: list[str]  # what to know of these records


def load_dataset(
    kind: str,
    path: str | Path | None = None,
    *,
    start: int = 0,
    limit: int | None = None,
    **options: Any,
) -> Dataset:
    """Read benchmark records as EasyEdit requests.

    A subject that is not a part of its prompt is left out, for ROME, MEMIT and our editor would
    refuse the request; a note says which.

    Args:
        kind: A name in `DATASETS`.
        path: File or directory; the reader says which. None for `facts`.
        start: First record.
        limit: Number of records; all if None.
        **options: The reader's own: such as `split` of facts.

    Raises:
        ValueError: If the kind or an option is unknown, a record breaks a rule (the message names
            file, record and field), or there are fewer records than asked for.
        TypeError: If a file or an option has the wrong type.
        FileNotFoundError: If a file is missing.
    """
    if kind not in DATASETS:
        raise ValueError(f"kind must be one of {sorted(DATASETS)}; got {short(kind)}")
    reader = DATASETS[kind]
    _check_options(kind, reader, options)
    source = reader(None if path is None else Path(path), **options)
    count = len(source.cases)
    if count == 0:
        why = "; ".join(source.notes)
        raise ValueError(f"{path} must hold a record that can be asked; got none: {why}")
    if not 0 <= start < count:
        raise ValueError(f"start must be in [0, {count - 1}] for {kind}; got {short(start)}")
    if limit is not None and not 1 <= limit <= count - start:
        raise ValueError(
            f"limit must be in [1, {count - start}] for {kind} from {start} on, or None for all; "
            f"got {short(limit)}"
        )
    cases = source.cases[start : None if limit is None else start + limit]
    requests = [case.as_request(number) for number, case in enumerate(cases, start)]
    left_out = sum(case.num_left_out for case in cases)
    notes = [
        *source.notes,
        *([f"{left_out} probes left out, for they lack prompt or answer"] if left_out else []),
        *_drop_foreign_subjects(requests),
        *_repeated_prompts(requests),
        *_missing_parts(requests),
    ]
    names = ", ".join(file.name for file in source.files)
    for number, request in enumerate(requests, start):
        try:
            EditRequest.from_dict(request)  # as an editor will
        except ValueError as error:
            raise ValueError(f"record {number} of {names}: {error}") from None
    return Dataset(requests, source.files, notes)


def _check_options(kind: str, reader: Callable[..., Any], options: Mapping[str, Any]) -> None:
    parameters = signature(reader).parameters.values()
    known = {p.name: type(p.default) for p in parameters if p.kind is Parameter.KEYWORD_ONLY}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(f"options of {kind} must be among {[*known]}; got {short(unknown)}")
    for name, value in options.items():
        if type(value) is not known[name]:
            kinds = {bool: "true or false", int: "an integer", str: "a text"}
            raise TypeError(f"{name} must be {kinds[known[name]]}; got {short(value)}")


def _drop_foreign_subjects(requests: Sequence[Request]) -> list[str]:
    """Remove subjects that are not in their prompts; say which."""
    foreign = [i for i, r in enumerate(requests) if r.get("subject", "") not in r["prompt"]]
    for i in foreign:
        del requests[i]["subject"]
    return [f"subject left out, for it is not in the prompt: records {foreign}"] if foreign else []


def _repeated_prompts(requests: Sequence[Request]) -> list[str]:
    """Name the records that share a prompt: with different targets they overwrite each other."""
    by_prompt: dict[str, dict[int, str]] = defaultdict(dict)
    for i, request in enumerate(requests):
        by_prompt[request["prompt"]][i] = request["target_new"]
    found: dict[str, list[str]] = {"different targets": [], "the same target": []}
    for targets in by_prompt.values():
        if len(targets) > 1:
            what = "the same target" if len(set(targets.values())) == 1 else "different targets"
            found[what].append(", ".join(map(str, targets)))
    return [
        f"{len(lists)} prompts are in several records with {what}: records "
        + shorten("; ".join(lists), _MAX_LIST, placeholder=" ...")
        for what, lists in found.items()
        if lists
    ]


def _missing_parts(requests: Sequence[Request]) -> list[str]:
    """Count the records without each part that a record can have."""
    found = Counter(part for request in requests for part in _parts(request))
    expected = {"subject", "rephrase_prompt", "loc_prompt", "locality", "portability", *found}
    counts = {part: len(requests) - found[part] for part in expected}
    return [
        f"no {part} in {count} of {len(requests)} records"
        for part, count in sorted(counts.items())
        if count > counts.get(part.partition(".")[0] if "." in part else "", 0)
    ]


def _parts(request: Request) -> set[str]:
    single = {key for key in ("subject", "rephrase_prompt", "loc_prompt") if key in request}
    sections = {key for key in ("locality", "portability") if request[key]}
    # May be empty: the edit itself is scored then.
    sections |= {"counterfact", "probes"} & request.keys()
    return single | sections | {f"{key}.{kind}" for key in sections for kind in request[key]}
