"""The command `export`: print the code or JSON by which a serving engine uses a kept edit."""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from baft_easyedit.cli.console import note
from baft_easyedit.cli.options import existing, new
from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.storage.config import KeptConfig
from baft_easyedit.storage.reading import read_latest


def add_commands(commands: Any) -> None:
    """Add the command."""
    export = commands.add_parser("export", help="say how a serving engine uses a kept edit")
    add = export.add_argument
    add("directory", type=existing("directory"), metavar="DIR", help="of the kept edit")
    add("--to", choices=_ENGINES, required=True, help="the engine")
    add("--out", type=new("file"), metavar="FILE", help="to write; printed if absent")
    export.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    """Check that an engine can serve an edit; print or write what the engine needs."""
    from baft_easyedit.engines.served import read_edit
    from baft_easyedit.files.writing import written_whole

    if arguments.out is not None and os.path.lexists(arguments.out):
        raise ValueError(f"--out must be a new file; {arguments.out} exists: name another")
    directory = str(arguments.directory.resolve())
    edit, config = read_edit(directory), read_latest(arguments.directory).config
    text = _ENGINES[arguments.to](directory, edit, config)
    if arguments.out is None:
        print(text)
    else:
        with written_whole(arguments.out) as stream:
            stream.write(f"{text}\n".encode())
    in_template = config.hparams.get("use_chat_template")
    form = "in the chat template" if in_template else "without a chat template"
    model, dtypes = config.base_model, config.fingerprint.dtypes
    note(f"the edit was learned on {model} in {dtypes}, prompts {form}: serve and ask it so")
    if config.revision is None:
        note(f"{model} may not be on the Hub: give the engine the path of the model")
    note("the engine's process needs baft_easyedit; compare its answers with those of `ask`")


def _sglang(directory: str, edit: ModelEdit, _: KeptConfig) -> str:
    """Return JSON for SGLang's option `--forward-hooks`."""
    from baft_easyedit.engines.sglang import specification

    note("--disable-radix-cache --chunked-prefill-size -1 --disable-cuda-graph must be given")
    note("the model's layers must be model.layers, as Llama's; others are served without the edit")
    return json.dumps(specification(directory, edit), indent=1)


def _vllm_lens(directory: str, _: ModelEdit, config: KeptConfig) -> str:
    """Return lines of Python for a program that uses vLLM."""
    return (
        "from vllm import LLM\n"
        "from baft_easyedit.engines.vllm_lens import register\n\n"
        f"llm = LLM({config.base_model!r}, enable_chunked_prefill=False, "
        "enable_prefix_caching=False)\n"
        f"register(llm, {directory!r})  # then llm.generate(...)"
    )


def _easysteer(directory: str, edit: ModelEdit, config: KeptConfig) -> str:
    """Return lines of Python for a program that uses vLLM with EasySteer."""
    from baft_easyedit.engines.easysteer import check_gate

    check_gate(edit, directory)
    return (
        "from vllm import LLM\n"
        "from baft_easyedit.engines.easysteer import specification\n\n"
        f"llm = LLM({config.base_model!r}, enable_steer_vector=True, "
        'steer_algorithms=["loreft"], steer_multi_vector=True)\n'
        f"spec = specification({directory!r})  # then llm.generate(..., steering=spec)"
    )


_ENGINES: Mapping[str, Callable[[str, ModelEdit, KeptConfig], str]] = {
    "easysteer": _easysteer,
    "sglang": _sglang,
    "vllm-lens": _vllm_lens,
}
