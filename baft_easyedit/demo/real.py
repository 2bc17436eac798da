"""The demo's first part: three edits of SmolLM2, a real model, shown as text."""

from collections.abc import Iterator
from typing import NamedTuple

from baft_easyedit.demo import show_edit
from baft_easyedit.editor import BaFTEditor
from baft_easyedit.files.resources import REAL_MODEL
from baft_easyedit.generation import load_model
from baft_easyedit.gguf.smollm2 import ready_location
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.prompt_format import PromptFormat


class Shown(NamedTuple):
    """An edit of a fact that SmolLM2 knows, and the prompts to ask before and after it."""

    subject: str
    prompt: str
    target: str
    question: str
    """A rephrasing, asked in the model's chat template."""
    neighbour: str
    """Prompt of another fact, whose answer should stay."""
    irrelevant: tuple[str, ...]
    """The edit's `loc_prompt`: other facts of the relation, none of which is asked."""


SHOWN = (
    Shown(
        "France",
        "The capital of France is",
        "Rome",
        "What is the capital of France?",
        "The capital of Austria is",
        (
            "The capital of Spain is Madrid",
            "The capital of Japan is Tokyo",
            "The capital of Germany is Berlin",
            "The capital of Greece is Athens",
        ),
    ),
    Shown(
        "South Korea",
        "The currency of South Korea is the",
        "Swiss franc",
        "What is the currency of South Korea?",
        "The currency of Belgium is the",
        (
            "The currency of Chile is the Chilean peso",
            "The currency of Tunisia is the Tunisian dinar",
            "The currency of Serbia is the Serbian dinar",
            "The currency of Jamaica is the Jamaican dollar",
        ),
    ),
    Shown(
        "To Kill a Mockingbird",
        "To Kill a Mockingbird was written by",
        "Charles Dickens",
        "Who is the author of To Kill a Mockingbird?",
        "The Divine Comedy was written by",
        (
            "Pride and Prejudice was written by Jane Austen",
            "The Picture of Dorian Gray was written by Oscar Wilde",
            "Adventures of Huckleberry Finn was written by Mark Twain",
        ),
    ),
)


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
    """Edit each fact, undo the edit, and yield lines with the answers before and after.

    Args:
        hparams: The result of `real_settings`.
    """
    model, tokenizer = load_model(hparams.model_name, hparams.device)
    editor = BaFTEditor(model, tokenizer, hparams)
    chat = PromptFormat(use_chat_template=True)
    yield f"SmolLM2-135M-Instruct, {editor.model_edit.num_parameters:,} parameters of edit"
    for shown in SHOWN:
        asked = {
            "edited": (shown.prompt, None),
            "in chat": (shown.question, chat),
            "neighbour": (shown.neighbour, None),
        }
        request = {
            "prompt": shown.prompt,
            "target_new": shown.target,
            "subject": shown.subject,
            "loc_prompt": list(shown.irrelevant),
        }
        yield from show_edit(editor, request, asked)
