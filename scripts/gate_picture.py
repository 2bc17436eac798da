"""Draw what the gate does, as README shows it: `python scripts/gate_picture.py docs/gate.svg`.

The first fact that the demo edits is edited. Then the mean weight over all layers and bases is
drawn, token by token, for the edited prompt, its rephrasing and an unrelated prompt of its
evaluation. Only the last tokens of a prompt and the answer are edited (dark); the others show what
the gate would do.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from baft_easyedit import BaFTEditor, BaFTHyperParams
from baft_easyedit.facts import edit_requests
from baft_easyedit.generation import load_model


def weights_of(editor: BaFTEditor, prompt: str, answer: str) -> tuple[list[str], Any, Any]:
    """Return the tokens of a prompt and its answer, their mean weights, and which are edited."""
    tokenizer = editor.tokenizer
    inputs = tokenizer(f"{prompt} {answer}", return_tensors="pt")
    edit, lengths = editor.model_edit, [len(tokenizer(prompt)["input_ids"])]
    with torch.no_grad(), edit.prompt_lengths(lengths), edit.recording() as record:
        editor.model(**inputs)
    weights = torch.stack([layer[0].mean(-1) for layer in record.weights.values()]).mean(0)
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert record.positions is not None
    # The first token marks the beginning of every text.
    return tokens[1:], weights[1:].tolist(), record.positions[0][1:].tolist()


def draw(panels: dict[str, tuple[list[str], Any, Any]]) -> Figure:
    """Draw one panel of bars for each text."""
    widths = [len(tokens) for tokens, _, _ in panels.values()]
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, gridspec_kw={"width_ratios": widths})
    for ax, (title, (tokens, weights, edited)) in zip(axes, panels.items(), strict=True):
        colours = ["#1f5f8b" if is_on else "#c9d6df" for is_on in edited]
        ax.bar(range(len(tokens)), weights, color=colours)
        inside = [weight for weight, is_on in zip(weights, edited, strict=True) if is_on]
        ax.set_title(f"{title}: mean {sum(inside) / len(inside):.2f}", fontsize=10)
        labels = [token.replace("▁", "") for token in tokens]
        ax.set_xticks(range(len(tokens)), labels, rotation=60, ha="right", fontsize=8)
        ax.set_ylim(0, 1)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean weight w(h)")
    return figure


def main() -> None:
    """Edit, look at the gate, and write the picture."""
    parser = argparse.ArgumentParser(description="Draw what the gate does.")
    parser.add_argument("out", type=Path, help="a file such as gate.svg")
    out = parser.parse_args().out
    hparams = BaFTHyperParams.from_hparams("BaFT/facts-llama", learn_end=True, device="cpu")
    editor = BaFTEditor(*load_model(hparams.model_name), hparams)
    request = next(fact for fact in edit_requests("eval") if fact["portability"])
    print(editor.edit(request))
    unrelated, target = request["locality"]["unrelated"], request["target_new"]
    texts = {
        "edited prompt": (request["prompt"], target),
        "rephrased": (request["rephrase_prompt"], target),
        "unrelated": (unrelated["prompt"], unrelated["ground_truth"]),
    }
    panels = {title: weights_of(editor, *text) for title, text in texts.items()}
    for title, (tokens, weights, _) in panels.items():
        print(title, [f"{t} {w:.2f}" for t, w in zip(tokens, weights, strict=True)])
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "gate"})
    draw(panels).savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
