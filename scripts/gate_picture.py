"""Draw what the gate does, as README shows it: `python scripts/gate_picture.py docs/gate.svg`.

The first fact that the demo edits is edited. Then the mean weight over all layers and bases is
drawn, token by token, for the edited prompt, its rephrasing and an unrelated prompt of its
evaluation. An edit acts on the last tokens of a prompt and on the answer; elsewhere is no bar.
"""

import argparse
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from baft_easyedit import BaFTEditor, BaFTHyperParams
from baft_easyedit.facts import edit_requests
from baft_easyedit.generation import load_model
from baft_easyedit.page.desk import gate_weights

Weights = tuple[list[str], list[float | None]]


def weights_of(editor: BaFTEditor, prompt: str, answer: str) -> Weights:
    """Return the tokens of a prompt and its answer, and their mean weights; None: not edited."""
    tokenizer = editor.tokenizer
    ids = tokenizer(f"{prompt} {answer}")["input_ids"]
    weights = gate_weights(editor, ids, len(tokenizer(prompt)["input_ids"])).mean(0)
    shown = [None if weight.isnan() else weight.item() for weight in weights]
    return tokenizer.convert_ids_to_tokens(ids)[1:], shown[
        1:
    ]  # the first token marks the beginning of every text


def draw(panels: dict[str, Weights]) -> Figure:
    """Draw one panel of bars for each text."""
    widths = [len(tokens) for tokens, _ in panels.values()]
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, gridspec_kw={"width_ratios": widths})
    for ax, (title, (tokens, weights)) in zip(axes, panels.items(), strict=True):
        ax.bar(range(len(tokens)), [weight or 0 for weight in weights], color="#1f5f8b")
        inside = [weight for weight in weights if weight is not None]
        ax.set_title(f"{title}: mean {sum(inside) / len(inside):.2f}", fontsize=10)
        labels = [token.replace("▁", "") for token in tokens]
        ax.set_xticks(range(len(tokens)), labels, rotation=60, ha="right", fontsize=8)
        for label, weight in zip(ax.get_xticklabels(), weights, strict=True):
            label.set_color("#9aa7b0" if weight is None else "black")
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
    for title, panel in panels.items():
        print(title, [f"{t} {w:.2f}" for t, w in zip(*panel, strict=True) if w is not None])
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "gate"})
    draw(panels).savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
