"""Record in `run.json` how a run is made, and check that a directory holds the same run.

A run may be continued, also with further rows and protocols. Everything that the existing scores
depend on must then be unchanged: settings, records, model, EasyEdit.
"""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

import baft_easyedit
from baft_easyedit.bench.config import BenchConfig, read_config
from baft_easyedit.bench.data import Dataset
from baft_easyedit.bench.data.files import read_file
from baft_easyedit.bench.methods import our_hparams, statistics_texts
from baft_easyedit.bench.store import SCHEMA, RunDirectory, digest
from baft_easyedit.easyedit import find_host
from baft_easyedit.easyedit.host import git
from baft_easyedit.easyedit.peers import own_preset_config
from baft_easyedit.files.messages import short
from baft_easyedit.files.paths import open_regular
from baft_easyedit.gguf.smollm2 import ready_location
from baft_easyedit.hparams import OUR_METHODS

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "lm_eval")
_SAMPLE = 1 << 20
"""Bytes hashed at each end of a weight file too large to read whole."""
_LARGE = 1 << 30
_WEIGHTS = (".safetensors", ".bin")
_USE = ("chat_template.jinja", "generation_config.json", "merges.txt", "vocab.json")
_MAY_DIFFER = (
    *("T", "batch_size", "methods", "device", "threads", "jobs"),
    *("judge", "similarity_model", "snippets"),
)
"""Settings that change no score already in a run; `methods` are compared row by row instead."""
_OF_A_SESSION = ("date", "command", "git", "versions", "hardware")
"""Entries of `run.json` that `earlier` keeps of each previous start of the run."""


def model_fingerprint(model: str) -> dict[str, str]:
    """Hash a model's configuration, tokenizer and weights.

    Returns:
        Hex digests: `model` (configuration and weights), `tokenizer`, and `use` (what else changes
        how texts become tokens and answers end). Of files above 1 GiB, only size, beginning and end
        are hashed. For a model of the Hugging Face hub, each is the commit in the cache, or the
        model's name if it is not there yet.
    """
    directory = Path(ready_location(model))
    if not directory.is_dir():
        config = try_to_load_from_cache(model, "config.json")  # in a directory named by the commit
        known = Path(config).parent.name if isinstance(config, str) else model
        return dict.fromkeys(("model", "tokenizer", "use"), known)
    files = sorted(file for file in directory.iterdir() if file.is_file())
    weights = [f for f in files if f.suffix in _WEIGHTS or f.name == "config.json"]
    tokenizer = [f for f in files if "token" in f.name or f.suffix == ".model"]
    use = [f for f in files if f.name in _USE]
    kinds = {"model": weights, "tokenizer": tokenizer, "use": use}
    return {kind: _hash_files(of_kind) for kind, of_kind in kinds.items()}


def _hash_files(files: list[Path]) -> str:
    hashed = sha256()
    for file in files:
        size = file.stat().st_size
        hashed.update(f"{file.name} {size}\n".encode())
        with open_regular(file) as stream:
            if size > _LARGE:
                hashed.update(stream.read(_SAMPLE))
                stream.seek(-_SAMPLE, os.SEEK_END)
            while block := stream.read(_SAMPLE):
                hashed.update(block)
    return hashed.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter to a score, but EasyEdit."""
    found = {"python": platform.python_version(), "baft_easyedit": baft_easyedit.__version__}
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is not None:
            found[name] = importlib.metadata.version(name)
    return found


def easyedit_version() -> dict[str, str]:
    """Return generation and version of the EasyEdit that runs the methods."""
    host = find_host()
    return {"generation": host.generation, "version": host.version}


def hardware() -> dict[str, Any]:
    """Return the hardware that the run is made on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": gpus}


def git_state() -> dict[str, Any] | None:
    """Return commit and cleanliness of the checkout this package runs from; None if installed."""
    root = Path(baft_easyedit.__file__).resolve().parent.parent
    commit = git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(git(root, "status", "--porcelain"))}


def run_record(directory: RunDirectory, config: BenchConfig, dataset: Dataset) -> dict[str, Any]:
    """Make the content of `run.json`; its entries on previous starts of the run are kept."""
    then = directory.record() if directory.run.is_file() else {}
    session = {name: then[name] for name in _OF_A_SESSION if name in then}
    return {
        "schema": SCHEMA,
        "status": "running",
        "command": sys.argv,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": config.seed,
        "locality_in_template": config.use_chat_template,  # generated; asked outside before 0.2
        "git": git_state(),
        "versions": versions(),
        "easyedit": easyedit_version(),
        "hardware": hardware(),
        "model": {"name": config.model, **model_fingerprint(config.model)},
        "data": {
            "kind": config.data.kind,
            "files": [vars(file) for file in dataset.files],
            "num_records": len(dataset.requests),
            "sha256": digest(dataset.requests),
            "notes": list(dataset.notes),
        },
        "inputs": {**then.get("inputs", {}), **_inputs(config)},
        "earlier": [*then.get("earlier", []), *([session] if session else [])],
    }


def _inputs(config: BenchConfig) -> dict[str, str]:
    """Hash what a configuration only names: files, and each row's hyper-parameters from our YAMLs.

    The model is hashed by its name, so that `bundled` has the same hash in each checkout.
    """
    inputs = {"the texts": digest(list(statistics_texts(config)))}
    if config.downstream is not None:
        where = config.downstream.include_path
        files = sorted(f for f in Path(where).rglob("*") if f.is_file()) if where else []
        inputs["the downstream task"] = digest([read_file(f)[1].sha256 for f in files])
    for method in config.methods:
        for protocol in config.protocols if method.method in OUR_METHODS else ():
            values = asdict(our_hparams(config, method, protocol))
            values |= {"model_name": config.model}
            values.pop("device")
            what = f"the hyper-parameters of {method.name}, {protocol.slug}"
            inputs[what] = digest(values)
        if method.method not in OUR_METHODS and config.peer_preset is not None:
            tuned = own_preset_config(method.method, config.peer_preset)
            if tuned is not None:
                inputs[f"the hyper-parameters of {method.name}"] = digest(tuned)
    return inputs


def with_earlier(directory: RunDirectory, config: BenchConfig) -> BenchConfig:
    """Return a configuration with the rows and protocols added that the run had before."""
    if not directory.run.is_file():
        return config
    then = read_config(directory.config)
    rows = {method.name: method for method in (*then.methods, *config.methods)}
    return config.model_copy(
        update={
            "methods": tuple(rows.values()),
            "T": tuple(dict.fromkeys([*then.T, *config.T])),
            "batch_size": tuple(dict.fromkeys([*then.batch_size, *config.batch_size])),
        }
    )


def check_same_run(directory: RunDirectory, config: BenchConfig, dataset: Dataset) -> None:
    """Check that a directory holds no run, or one that a configuration may continue.

    Raises:
        ValueError: If it holds a run with other settings, records, model, files or EasyEdit, or one
            whose `run.json` is damaged or lost.
    """
    if not directory.run.is_file():
        if any((directory.root / "chunks").glob("*")):
            raise ValueError(
                f"{directory.run} must be there, for {directory.root} holds what was run: give "
                "another directory, or delete that one"
            )
        return
    then = _settings(read_config(directory.config).model_dump(mode="json"))
    now = _settings(config.model_dump(mode="json"))
    different = [
        f"{name} {short(then[name])}; got {short(value)}"
        for name, value in now.items()
        if then.get(name, value) != value
    ]
    run, inputs = directory.record(), _inputs(config)
    was = {
        "records": run["data"]["sha256"] == digest(dataset.requests),
        **{
            # A model that was not in the cache yet was recorded by its name.
            kind if kind == "model" else f"the model's {kind}": run["model"].get(kind, value)
            in (value, config.model)
            for kind, value in model_fingerprint(config.model).items()
        },
        "EasyEdit": run["easyedit"] == easyedit_version(),
        "answers for locality, asked outside of the template": not config.use_chat_template
        or run.get("locality_in_template", False),
        **{what: run["inputs"].get(what, value) == value for what, value in inputs.items()},
    }
    others = [what for what, is_same in was.items() if not is_same]
    different += [f"other content under the same name: {what}" for what in others]
    if different:
        raise ValueError(
            f"{directory.root} holds a run with {different[0]}: give another directory, or delete "
            "that one"
        )


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a run's scores depend on, among them each row by its name."""
    settings = {k: v for k, v in content.items() if k not in _MAY_DIFFER}
    return {**settings, **{f"the row {row['name']}": row for row in content["methods"]}}
