"""What gpu_check.sh measures beside `baft-easyedit speed`, and the table of all its parts.

python gpu_parts.py apart SHAPE DEVICE FILE COUNT        so many edits learned side by side
python gpu_parts.py in_a_row SHAPE DEVICE FILE COUNT     edits in a row, with bases shared, or own
python gpu_parts.py weights SHAPE DEVICE DIRECTORY       random weights, as files
python gpu_parts.py table DIRECTORY                      gpu_check.json and a table of what is there
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from baft_easyedit import BaFTEditor, BaFTHyperParams
from baft_easyedit.hparams import scaled_layers
from baft_easyedit.model.devices import as_device
from baft_easyedit.speed.inputs import random_model, random_requests
from baft_easyedit.speed.measure import timed, with_peak

STEPS = 40
PROMPT_LENGTH = 32
COLUMNS = ("first_s", "edit_s", "step_s", "step_to_bound", "peak_bytes", "generation_ratio")


def model_on(shape: str, device: str) -> tuple[Any, Any]:
    """Make the model on the device, on a GPU in bfloat16, and its tokenizer."""
    where = as_device(int(device) if device.isdigit() else device)
    return random_model(shape, where, torch.float32 if where.type == "cpu" else torch.bfloat16)


def editor_of(model: Any, tokenizer: Any, **options: Any) -> BaFTEditor:
    """Make an editor whose edits take all their steps."""
    layers = scaled_layers(model.config.num_hidden_layers)
    hparams = BaFTHyperParams(
        model_name="random", layers=layers, num_steps=STEPS, early_stop_loss=0.0, **options
    )
    return BaFTEditor(model, tokenizer, hparams)


def measured(
    edit: Callable[[Any], object], model: Any, tokenizer: Any, count: int
) -> dict[str, Any]:
    """Time the first call of an edit and the third; `count` edits share a call's time."""
    seconds, peaks, device = [], [], model.device
    for seed in range(3):
        asked = random_requests(tokenizer, PROMPT_LENGTH, count, seed)
        peak, (spent, _) = with_peak(lambda a=asked: timed(lambda: edit(a), device), device)
        seconds.append(spent / count)
        peaks.append(peak or 0)
    return {"first_s": seconds[0], "edit_s": seconds[-1], "peak_bytes": max(peaks)}


def apart(shape: str, device: str, file: str, count: str) -> None:
    """Measure edits that are learned side by side."""
    model, tokenizer = model_on(shape, device)
    editor, size = editor_of(model, tokenizer), int(count)
    row = measured(lambda asked: editor.learn_apart(asked, size), model, tokenizer, size)
    write(file, {f"BaFT, {count} side by side": row})


def in_a_row(shape: str, device: str, file: str, count: str) -> None:
    """Measure edits after as many others, with which they share bases or not."""
    model, tokenizer = model_on(shape, device)
    rows = {}
    apart = {"min_similarity": 0.75, "rank": 4}
    for name, settings in {"in a row": {}, "own bases": apart}.items():
        editor = editor_of(model, tokenizer, **settings)
        for request in random_requests(tokenizer, PROMPT_LENGTH, int(count), 99):
            editor.edit(request)
        rows[f"BaFT, {name}"] = measured(editor.edit, model, tokenizer, 1)
        editor.model_edit.detach()
    write(file, rows)


def weights(shape: str, device: str, directory: str) -> None:
    """Write a model of random weights and its tokenizer."""
    for part in model_on(shape, device):
        part.save_pretrained(directory)


def write(file: str, rows: dict[str, dict[str, Any]]) -> None:
    """Write rows in the form of a speed report."""
    found = [{"row": {"name": name}, "summary": row} for name, row in rows.items()]
    Path(file).write_text(json.dumps({"rows": found}, indent=1) + "\n", encoding="utf-8")


def table(directory: str) -> None:
    """Join the parts, and print a line for each of their rows, and for each part without any."""
    out = Path(directory)
    parts = {}
    for line in (out / "parts.txt").read_text(encoding="utf-8").splitlines():
        name, status, seconds = line.split()
        file = out / f"{name}.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        parts[name] = {"status": int(status), "seconds": int(seconds), **found}
    text = json.dumps({"gpu": gpu(), "parts": parts}, indent=1)
    (out / "gpu_check.json").write_text(text + "\n", encoding="utf-8")
    print(f"{gpu()}\n| part | row | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 2)}")
    for name, part in parts.items():
        told = "done" if part["status"] == 0 else f"failed ({part['status']}), see {name}.log"
        rows = part.get("rows", [])
        if part["status"] or not rows:
            rows = [*rows, {"row": {"name": told}, "summary": {}}]
        for row in rows:
            cells = [cell(row["summary"].get(column)) for column in COLUMNS]
            print(f"| {name} | {row['row']['name']} | {' | '.join(cells)} |")


def cell(value: float | None) -> str:
    """Write a number with three digits; bytes in MiB."""
    if value is None:
        return "–"
    return f"{value / 2**20:.0f} MiB" if value >= 2**16 else f"{value:.3g}"


def gpu() -> str:
    """Name the device and torch."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, torch {torch.__version__}"


if __name__ == "__main__":
    commands = {f.__name__: f for f in (apart, in_a_row, weights, table)}
    commands[sys.argv[1]](*sys.argv[2:])
