"""What the page does, without a page: an editor that is asked and changed by one at a time."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baft_easyedit.editor import BaFTEditor
from baft_easyedit.files.messages import printable
from baft_easyedit.generation import generate_answers
from baft_easyedit.model.inspect import max_context
from baft_easyedit.model.prompt_format import PromptFormat
from baft_easyedit.storage.journal import Journal
from baft_easyedit.storage.reading import read_history

HEADERS = ("entry", "change", "prompt", "target", "in force")
"""Columns of `Desk.rows`."""
_UNLEARNED = "Made, but not learned (undo it, or give --hparams with more num_steps or lr)"
_MOST_SHOWN = 40
"""Most tokens in a picture: the last ones, where an edit acts."""


def gate_weights(editor: BaFTEditor, ids: Sequence[int], prompt_length: int) -> Tensor:
    """Return the mean weight over the bases of each edited layer at each token.

    Args:
        editor: Its edit is looked at.
        ids: T tokens of a prompt and its answer.
        prompt_length: How many of them are the prompt's.

    Returns:
        [L, T], NaN where the edit does not act; no layers if it is not attached.
    """
    edit, tokens = editor.model_edit, torch.tensor([list(ids)], device=editor.model.device)
    with torch.no_grad(), edit.prompt_lengths([prompt_length]), edit.recording() as record:
        editor.model(input_ids=tokens)
    if record.positions is None:
        return torch.empty(0, len(ids))
    weights = torch.stack([layer[0].mean(-1).cpu() for layer in record.weights.values()])
    return weights.masked_fill(~record.positions[0].cpu(), torch.nan)


def picture(tokens: Sequence[str], layers: Sequence[int], weights: Tensor) -> Any:
    """Draw the weights [L, T] of tokens and layers as a heat map; grey where no edit acts."""
    from matplotlib.figure import Figure

    size = (max(6, 2 + 0.3 * len(tokens)), 1.5 + 0.3 * len(layers))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(weights.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_facecolor("0.9")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    ticks = range(len(tokens))  # a dollar in a token begins no formula
    axes.set_xticks(ticks, tokens, fontsize=8, rotation=60, ha="right", parse_math=False)
    axes.set_title("Gate at prompt and edited answer; grey: the edit does not act", fontsize=9)
    figure.colorbar(image, label="mean weight")
    return figure


class Desk:
    """An editor of an open directory; its model is used by one thread at a time.

    What it does has the errors of `BaFTEditor`'s methods, and returns what to tell of it.
    """

    def __init__(self, editor: BaFTEditor, directory: Path) -> None:
        self.editor, self.directory = editor, directory
        self.lock = threading.Lock()
        """Held while the model is used."""

    def ask(
        self, prompt: str, in_chat: bool | None = None, max_new_tokens: int = 32
    ) -> tuple[str, str, Any]:
        """Return the base and the edited answer, and a picture of the gate; None: no edit acts.

        The prompt is put into the chat template if `in_chat`; None: as edits are learned.

        Raises:
            ValueError: If the prompt is blank, or too long for the model.
        """
        model, tokenizer = self.editor.model, self.editor.tokenizer
        prompt_format = PromptFormat.of(self.editor.hparams).with_template(in_chat)
        if not prompt.strip():
            raise ValueError("prompt must not be empty: write one")
        length = len(prompt_format.prompt_ids(prompt, tokenizer))
        room = max_context(model) or 2**31
        if length + max_new_tokens > room:
            raise ValueError(
                f"prompt and answer must fit the model's context of {room} tokens; got {length} "
                f"and {max_new_tokens}: shorten one"
            )
        answer = partial(generate_answers, model, tokenizer, [prompt], max_new_tokens)
        with self.lock:
            with self.editor.model_edit.disabled():
                (base,) = answer(prompt_format=prompt_format)
            (edited,) = answer(prompt_format=prompt_format)
            ids = prompt_format.whole_ids(prompt, edited, tokenizer)[:room]
            weights = gate_weights(self.editor, ids, length)[:, -_MOST_SHOWN:]
        if not len(weights):
            return base, edited, None
        tokens = [printable(tokenizer.decode([i])) for i in ids[-_MOST_SHOWN:]]
        return base, edited, picture(tokens, self.editor.model_edit.layers, weights)

    def learn(self, prompt: str, target: str, subject: str = "", irrelevant: str = "") -> str:
        """Make an edit; the subject may be blank, and irrelevant prompts are lines."""
        request = {
            "prompt": prompt,
            "target_new": target,
            "subject": subject if subject.strip() else None,
            "loc_prompt": [line for line in irrelevant.splitlines() if line.strip()],
        }
        with self.lock:
            report = self.editor.edit(request)
        cost = f"{report.num_steps} steps, loss {report.final_loss:.3f}, {report.time_s:.1f} s"
        came = "Learned" if all(report.learned) else _UNLEARNED
        return "\n".join([f"{came}: {cost}", *(report.gates.warnings() if report.gates else ())])

    def undo(self) -> str:
        """Take the latest edit back."""
        with self.lock:
            self.editor.undo()
            return f"Now the state is that after entry {self._journal().position}."

    def rollback(self, entry: int | None) -> str:
        """Go to the state after an entry."""
        with self.lock:
            self.editor.rollback(-1 if entry is None else entry)
            return f"Now the state is that after entry {entry}."

    def forget(self, prompt: str, tell: Callable[[int, int], object]) -> str:
        """Take the edits of one prompt back, and learn the later ones again.

        `tell` is called with how many of how many are learned again.
        """
        with self.lock:
            journal = self._journal()
            path, done = journal.path_from(prompt, str(self.directory)), count(1)
            total = sum(any(r["prompt"] != prompt for r in entry.requests) for entry in path)
            tell(0, total)
            reports = self.editor.forget(prompt, lambda _: tell(next(done), total))
        unlearned = sum(report.learned.count(False) for report in reports)
        return (
            f"Forgotten; later edits learned again: {len(reports)}, not learned: {unlearned}. To "
            f"bring it back, go to entry {journal.entries[-1].id}."
        )

    def rows(self) -> list[list[Any]]:
        """Return a row of `HEADERS` for each request of each entry, the latest first.

        Of the edits of one prompt that led to the present state, the latest is in force.
        """
        journal = self._journal()
        present, replaced = set(journal.ancestors(journal.position)), set[str]()
        rows: list[list[Any]] = []
        for entry in reversed(journal.entries):
            change = entry.kind if entry.to is None else f"{entry.kind} to {entry.to}"
            requests = entry.requests
            if forgotten := entry.content.get("forgotten"):
                change, requests = "forget", [{"prompt": forgotten}]
            is_present = entry.id in present
            for request in requests or [{}]:
                texts = [str(request.get(key, "")) for key in ("prompt", "target_new")]
                is_on = is_present and texts[0] not in replaced
                rows.append([entry.id, change, *texts, "yes" if is_on else ""])
                if is_present and request:
                    replaced.add(texts[0])
        return rows

    def _journal(self) -> Journal:
        """Read the journal, which needs no lock."""
        return Journal(read_history(self.directory))
