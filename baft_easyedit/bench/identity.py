"""What a run is: its record in `run.json`, and whether a directory holds the same run.

A run may go on with further rows and protocols; whatever decides the scores that are there must be
what it was.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from baft_easyedit.bench import provenance
from baft_easyedit.bench.config import BenchConfig, make_config
from baft_easyedit.bench.datasets import Dataset, load_piqa
from baft_easyedit.bench.plan import protocols
from baft_easyedit.bench.settings import our_hparams, statistics_texts
from baft_easyedit.bench.store import SCHEMA, RunDirectory, read_json
from baft_easyedit.easyedit.base_editor import OUR_METHODS
from baft_easyedit.easyedit.peers import own_preset_config
from baft_easyedit.files.messages import short
from baft_easyedit.files.reading import read_yaml

_MAY_DIFFER = ("T", "batch_size", "methods", "device", "threads", "jobs", "timeout_s", "report_to")
"""Settings that change no score that is there; rows are compared one by one."""
_OF_A_SESSION = ("date", "command", "git", "versions", "hardware")
"""What `earlier` keeps of each time that the run was started before."""


def run_record(
    directory: RunDirectory, config: BenchConfig, dataset: Dataset, command: Sequence[str]
) -> dict[str, Any]:
    """Make the content of `run.json`.

    Args:
        directory: The run; what its `run.json` says of earlier sessions is kept.
        config: What is run now.
        dataset: The records.
        command: What was typed.
    """
    then = read_json(directory.run) if directory.run.is_file() else {}
    session = {name: then[name] for name in _OF_A_SESSION if name in then}
    return {
        "schema": SCHEMA,
        "status": "running",
        "command": list(command) or sys.argv,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": config.seed,
        "git": provenance.git_state(),
        "versions": provenance.versions(),
        "easyedit": provenance.easyedit_version(),
        "hardware": provenance.hardware(),
        "model": {"name": config.model, **provenance.model_fingerprint(config.model)},
        "data": {
            "kind": dataset.kind,
            "files": [vars(file) for file in dataset.files],
            "num_records": len(dataset.requests),
            "sha256": provenance.digest(dataset.requests),
            "notes": list(dataset.notes),
        },
        "inputs": {**then.get("inputs", {}), **_inputs(config)},
        "earlier": [*then.get("earlier", []), *([session] if session else [])],
    }


def _inputs(config: BenchConfig) -> dict[str, str]:
    """Hash what a configuration names but does not hold: files, and presets of ours, by row."""
    inputs = {"the texts": provenance.digest(list(statistics_texts(config)))}
    if config.downstream is not None:
        files = load_piqa(config.downstream.path, config.downstream.limit).files
        inputs["the downstream task"] = provenance.digest([file.sha256 for file in files])
    for method in config.methods:
        for protocol in protocols(config) if method.method in OUR_METHODS else ():
            values = asdict(our_hparams(config, method, protocol))
            values.pop("device")
            what = f"the hyper-parameters of {method.name}, {protocol.slug}"
            inputs[what] = provenance.digest(values)
        if method.method not in OUR_METHODS and config.peer_preset is not None:
            tuned = own_preset_config(method.method, config.peer_preset)
            if tuned is not None:
                inputs[f"the hyper-parameters of {method.name}"] = provenance.digest(tuned)
    return inputs


def with_earlier(directory: RunDirectory, config: BenchConfig) -> BenchConfig:
    """Return a configuration with the rows and protocols too that the run had before."""
    if not directory.run.is_file():
        return config
    then = make_config(_read_config(directory))
    names = {method.name for method in then.methods}
    return config.model_copy(
        update={
            "methods": (*then.methods, *(m for m in config.methods if m.name not in names)),
            "T": tuple(dict.fromkeys([*then.T, *config.T])),
            "batch_size": tuple(dict.fromkeys([*then.batch_size, *config.batch_size])),
        }
    )


def check_same_run(directory: RunDirectory, config: BenchConfig, dataset: Dataset) -> None:
    """Check that a directory holds no run, or one that may go on with a configuration.

    Raises:
        ValueError: If it holds a run with other settings, records, model, files or EasyEdit.
    """
    if not directory.run.is_file():
        return
    then, now = (
        _settings(content) for content in (_read_config(directory), config.model_dump(mode="json"))
    )
    for name, value in now.items():
        if then.get(name, value) != value:
            _refuse(directory.root, f"{name} {short(then[name])}; got {short(value)}")
    run, inputs = read_json(directory.run), _inputs(config)
    model = provenance.model_fingerprint(config.model)["model"]
    was = {
        "records": run["data"]["sha256"] == provenance.digest(dataset.requests),
        # A model that was not in the cache yet was known by its name.
        "model": run["model"]["model"] in (model, config.model),
        "EasyEdit": run["easyedit"] == provenance.easyedit_version(),
        **{what: run["inputs"].get(what, value) == value for what, value in inputs.items()},
    }
    for what, is_same in was.items():
        if not is_same:
            _refuse(directory.root, f"other content under the same name: {what}")


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the scores of a run: its settings, and each row by its name."""
    settings = {k: v for k, v in content.items() if k not in _MAY_DIFFER}
    return {**settings, **{f"the row {row['name']}": row for row in content["methods"]}}


def _read_config(directory: RunDirectory) -> dict[str, Any]:
    """Read the configuration of a run."""
    return read_yaml(directory.config, "benchmark settings")


def _refuse(root: Path, difference: str) -> None:
    """Raise ValueError about a run that is another."""
    raise ValueError(
        f"{root} holds a run with {difference}: give another directory, or delete that one"
    )
