"""The demo's first part: three edits of SmolLM2, a real model, shown as text."""

from collections.abc import Iterator

from baft_easyedit.demo import show_edit
from baft_easyedit.editor import BaFTEditor
from baft_easyedit.facts import edit_requests
from baft_easyedit.files.resources import REAL_MODEL
from baft_easyedit.generation import load_model
from baft_easyedit.gguf.smollm2 import ready_location
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.prompt_format import PromptFormat

_SUBJECTS = ("India", "Zambia", "Xiaomi")
"""Of each, the first record of what SmolLM2 knows that can be rephrased as a question is edited."""


def real_settings(device: int | str) -> BaFTHyperParams:
    """Convert SmolLM2 if that was not done before, and return its hyper-parameters.

    Raises:
        ImportError: If the model's package is not installed.
        ValueError: If the package holds another file than that of the known release.
        OSError: If the model cannot be written.
    """
    ready_location(REAL_MODEL)
    return BaFTHyperParams.from_hparams("BaFT/smollm2", device=device, learn_end=True)


def show_real_edits(hparams: BaFTHyperParams) -> Iterator[str]:
    """Edit each fact, undo the edit, and yield lines with the answers before and after."""
    model, tokenizer = load_model(hparams.model_name, hparams.device)
    editor = BaFTEditor(model, tokenizer, hparams)
    chat = PromptFormat(use_chat_template=True)
    yield f"SmolLM2-135M-Instruct, {editor.model_edit.num_parameters:,} parameters of edit"
    questions = [r for r in edit_requests("known") if r["rephrase_prompt"].endswith("?")]
    for subject in _SUBJECTS:
        request = next(r for r in questions if r["subject"] == subject)
        asked = {
            "edited": (request["prompt"], None),
            "in chat": (request["rephrase_prompt"], chat),
            "neighbour": (request["locality"]["neighborhood"]["prompt"], None),
        }
        yield from show_edit(editor, request, asked)
