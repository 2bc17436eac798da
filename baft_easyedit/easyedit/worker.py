"""The process in which one method runs; started by `runner.run_methods`, speaks JSON lines.

EasyEdit keeps state in its modules and prints a lot: each method has a process of its own, whose
working directory is temporary and whose output goes to a file there.
"""

import json
import os
import random
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from baft_easyedit.easyedit.base_editor import OUR_METHODS
from baft_easyedit.easyedit.host import Host
from baft_easyedit.easyedit.model_path import host_model_path
from baft_easyedit.easyedit.peer_fixes import fix_peer
from baft_easyedit.easyedit.peers import (
    NEED_TEXTS,
    PEERS,
    ModelShape,
    peer_hparams,
    write_statistics,
)
from baft_easyedit.easyedit.plugin import register
from baft_easyedit.easyedit.protocols import run_continual, run_single
from baft_easyedit.easyedit.records import RunResult
from baft_easyedit.hparams import BaFTHyperParams, ReFTHyperParams, scaled_layers


def main(job_file: str) -> None:
    """Run the job described by a JSON file, and report on what was standard output.

    Args:
        job_file: Path of the JSON file that `runner.run_methods` wrote.
    """
    events = _claim_stdout()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))

    def progress(done: int, total: int, case: Mapping[str, Any]) -> None:
        _send(events, {"done": done, "total": total, "case": case})

    try:
        result = _run(job, progress)
    # Whatever a method of EasyEdit raises (its asserts, and libraries' errors), it becomes a row.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        result = RunResult(
            method=job["method"],
            protocol=job["protocol"],
            error=f"{type(error).__name__}: {error}",
        )
    _send(events, {"result": result.to_dict()})


def _claim_stdout() -> TextIO:
    """Keep standard output for events; let everything that is printed go where errors go."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return events


def _send(events: TextIO, event: Mapping[str, Any]) -> None:
    """Write one event as a line."""
    events.write(json.dumps(event, default=str) + "\n")
    events.flush()


def _run(job: Mapping[str, Any], progress: Any) -> RunResult:
    """Run one method under one protocol."""
    known = (*OUR_METHODS, *PEERS)
    if job["method"] not in known:
        raise ValueError(f"method must be one of {', '.join(known)}; got {job['method']!r}")
    torch.set_num_threads(job["threads"])
    host = register()
    from easyeditor import BaseEditor

    hparams, notes = _hparams(job, host)
    editor = BaseEditor.from_hparams(hparams)
    if job["method"] in NEED_TEXTS:
        write_statistics(editor, job["texts"])
    _seed(job["seed"])
    if job["protocol"] == "single":
        result = run_single(editor, job["requests"], progress)
    else:
        T = int(job["protocol"].removeprefix("continual-"))
        result = run_continual(editor, job["requests"], T, progress)
    return RunResult(**{**vars(result), "method": job["method"], "notes": (*notes, *result.notes)})


def _hparams(job: Mapping[str, Any], host: Host) -> tuple[Any, tuple[str, ...]]:
    """Make the hyper-parameters of our methods or a peer."""
    name, path = job["method"], host_model_path(job["model_path"])
    overrides = dict(job["hparams"])
    if name not in OUR_METHODS:
        hparams, notes = peer_hparams(
            name, path, job["device"], Path.cwd(), host.generation, len(job["texts"]), overrides
        )
        return hparams, (*notes, *fix_peer(name, hparams))
    hparams_class = BaFTHyperParams if name == "BaFT" else ReFTHyperParams
    given = {"model_name": path, "device": job["device"], **overrides}
    preset = job["presets"].get(name)
    if preset is None:
        preset = f"{name}/facts-llama"
        given.setdefault("layers", scaled_layers(ModelShape.of(path).depth))
    return hparams_class.from_hparams(preset, **given), ()


def _seed(seed: int) -> None:
    """Seed what EasyEdit's methods draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


if __name__ == "__main__":
    main(sys.argv[1])
