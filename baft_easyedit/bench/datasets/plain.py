"""EasyEdit request dicts as they are: from a JSON file, or from the package's own facts."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict

from baft_easyedit import facts
from baft_easyedit.bench.datasets.files import find_file, read_file, read_records
from baft_easyedit.bench.datasets.schema import Case, Probe, Source, check_all
from baft_easyedit.facts.records import Split


def _split_probe(probe: Any) -> Any:
    """Cut EasyEdit's probe, one prompt or parallel lists, into single probes."""
    if probe is None:
        return []
    if not isinstance(probe, dict):
        raise ValueError("must be a dict with the keys prompt and ground_truth")
    prompts: Any = probe.get("prompt")
    answers: Any = probe.get("ground_truth")
    if not isinstance(prompts, list):
        prompts, answers = [prompts], [answers]
    aliases: Any = probe.get("aliases", answers)
    for name, values in (("ground_truth", answers), ("aliases", aliases)):
        if not isinstance(values, list) or len(values) != len(prompts):
            raise ValueError(
                f"{name} must be a list with an entry for each of {len(prompts)} prompts"
            )
    return [
        {"prompt": prompt, "ground_truth": [answer, others]}
        for prompt, answer, others in zip(prompts, answers, aliases, strict=True)
    ]


_Sections = dict[str, Annotated[tuple[Probe, ...], BeforeValidator(_split_probe)]]


class _Request(Case):
    """A request dict of EasyEdit; keys that are not checked here are kept."""

    model_config = ConfigDict(extra="allow")

    locality: _Sections | None = None
    portability: _Sections | None = None


def read_requests(path: Path | None) -> Source:
    """Read a JSON list of EasyEdit's request dicts, such as the `requests.json` of a run.

    A probe has one prompt or a list of them; its `ground_truth` is a text for each prompt, or a
    list of accepted ones. `ground_truth`, `locality` and `portability` may be missing.

    Args:
        path: The file.

    Raises:
        ValueError: If a request breaks a rule.
        TypeError: If the file holds no list.
        FileNotFoundError: If the file is missing.
    """
    records, file = read_records(find_file(path))
    return Source(check_all(_Request, records, file.name), [file], [])


def read_facts(path: Path | None, *, split: Split = "eval") -> Source:
    """Return the package's own facts as edits, see `baft_easyedit.facts.edit_requests`.

    Args:
        path: None: the tables are a part of the package.
        split: `train` or `eval`, or `known` or `known_train`, the parts that SmolLM2 knows.

    Raises:
        ValueError: If `path` is given, or there is no such split.
    """
    if path is not None:
        raise ValueError(f"path must be None for facts, which the package brings; got {path}")
    folder = Path(facts.__file__).parent / "data"
    tables = [
        read_file(table)[1] for table in sorted([*folder.glob("*.tsv"), *folder.glob("*.json")])
    ]
    return Source(check_all(_Request, facts.edit_requests(split), "facts"), tables, [])
