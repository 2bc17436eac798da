"""The demo behind `baft-easyedit demo`: `real` edits SmolLM2, `bundled` the package's own model."""

from collections.abc import Iterator, Mapping
from typing import Any

from baft_easyedit.editor import BaFTEditor
from baft_easyedit.generation import generate_answers
from baft_easyedit.model.prompt_format import PromptFormat

Asked = Mapping[str, tuple[str, PromptFormat | None]]
"""Prompts, each with the format in which it is asked, by what they show."""


def show_edit(editor: BaFTEditor, request: Mapping[str, Any], asked: Asked) -> Iterator[str]:
    """Make an edit, undo it, and yield lines with the answers before and after."""

    def answers() -> list[str]:
        model, tokenizer = editor.model, editor.tokenizer
        return [
            generate_answers(model, tokenizer, [prompt], prompt_format=prompt_format)[0]
            for prompt, prompt_format in asked.values()
        ]

    before, report, after = answers(), editor.edit(request), answers()
    editor.undo()
    cost = f"{report.num_steps} steps, {report.time_s:.1f} s"
    yield f"\n{request['prompt']} -> {request['target_new']}   ({cost})"
    for (kind, (prompt, _)), old, new in zip(asked.items(), before, after, strict=True):
        change = f"{old} -> {new}" if old != new else f"{old} (as before)"
        yield f"  {kind:10} {prompt} ... {' '.join(change.split())}"
