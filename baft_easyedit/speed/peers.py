"""EasyEdit's methods as methods to measure, through the same session as benchmarks.

They run with their own hyper-parameters, scaled to the model: number of steps and early stops are
theirs. Statistics and caches that they need once for a model are made before the clock starts.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from baft_easyedit.easyedit.host import loaded_generation
from baft_easyedit.easyedit.model_path import host_model_path
from baft_easyedit.easyedit.peers import (
    NEED_TEXTS,
    batchable,
    fix_peer,
    peer_hparams,
    prepare_method,
    write_statistics,
)
from baft_easyedit.easyedit.plugin import register
from baft_easyedit.easyedit.session import Session, make_editor, prepare_requests
from baft_easyedit.speed.methods import Requests, Sample
from baft_easyedit.speed.options import SpeedOptions
from baft_easyedit.speed.prompts import random_requests

_SEED = 0
_NUM_TEXTS = 100
_TEXT_LENGTH = 32


class PeerMethod:
    """A method of EasyEdit on a model that EasyEdit loads. Its files go to the working directory.

    Args:
        name: A name of `peers.PEERS`.
        model: Hugging Face name or directory, or `bundled`.
        options: Device and dtype.

    Raises:
        ValueError: If the method cannot be run under this EasyEdit.
        ImportError: If there is no EasyEdit.
    """

    step_bytes: int | None = None

    def __init__(self, name: str, model: str, options: SpeedOptions) -> None:
        host = register()
        num_texts = _NUM_TEXTS if name in NEED_TEXTS else 0
        hparams, notes = peer_hparams(
            name,
            host_model_path(model),
            options.device,
            Path.cwd(),
            host.generation,
            num_texts,
            {} if options.dtype == "float32" else {"fp16": True},
        )
        self._name = name
        self.notes = [f"EasyEdit {host.version} ({host.generation})", *notes]
        self.notes += fix_peer(name, hparams)
        if options.dtype == "bfloat16":
            self.notes.append(f"{name}: in float16, as EasyEdit loads no bfloat16")
        torch.manual_seed(_SEED)
        editor = make_editor(hparams)
        if num_texts:
            texts = random_requests(editor.tok, _TEXT_LENGTH, num_texts, _SEED)
            write_statistics(editor, [text["prompt"] for text in texts])
        prepare_method(name, editor, _SEED)
        self.tokenizer: Any = editor.tok
        self.device: torch.device = next(editor.model.parameters()).device
        self._session = Session(editor, "", verify=False)

    @property
    def model(self) -> Any:
        """The model as it is now, edited or not."""
        return self._session.model

    def edit(self, requests: Requests) -> Sample:
        """Edit requests together in one call.

        Raises:
            ValueError: If there are several, and the method edits one at a time.
        """
        if len(requests) > 1 and not batchable(self._name, loaded_generation()):
            raise ValueError(
                f"batch_size must be 1 for {self._name}, which edits one request at a time in "
                f"EasyEdit; got {len(requests)}"
            )
        with step_times() as times:
            seconds = self._session.edit(prepare_requests(requests))
        between = len(times) - 1
        step_s = (times[-1] - times[0]) / between if between > 0 else None
        return Sample(seconds, len(times) or None, step_s)

    def undo(self) -> None:
        """Take the edit back."""
        self._session.restore()


@contextmanager
def step_times() -> Iterator[list[float]]:
    """Collect when each step of any of torch's optimisers ended in this context, in seconds."""
    times: list[float] = []
    handle = register_optimizer_step_post_hook(lambda *_: times.append(time.perf_counter()))
    try:
        yield times
    finally:
        handle.remove()
