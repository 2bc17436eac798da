"""Train the bundled fact model from scratch, score it and write its model card.

Usage: python scripts/train_facts_model.py [--out DIR] [--epochs N] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import logging
import random
import time
from pathlib import Path

import torch

from baft_easyedit.facts import bundled_model_path, questions
from baft_easyedit.facts.evaluation import exact_match, score, write_model_card
from baft_easyedit.facts.training import (
    TrainingRecipe,
    build_model,
    build_tokenizer,
    save_model,
    train,
)
from baft_easyedit.generation import load_model

CHECKPOINT_EPOCHS = 4


def main() -> None:
    """Run the recipe."""
    default = TrainingRecipe()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=bundled_model_path(), help="model folder")
    parser.add_argument("--epochs", type=int, default=default.epochs)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)

    recipe = dataclasses.replace(default, epochs=args.epochs, seed=args.seed)
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)

    def checkpoint(epoch: int) -> None:
        """Save from time to time, and show how the accuracy goes."""
        if epoch % CHECKPOINT_EPOCHS:
            return
        save_model(model, tokenizer, args.out)
        loaded = load_model(str(args.out), args.device)
        for kind in ("trained", "held_out"):
            sample = random.Random(0).sample(questions(kind), 300)
            print(f"after {epoch} epochs, {kind}: {exact_match(*loaded, sample):.3f}", flush=True)

    start = time.perf_counter()
    train(model, tokenizer, recipe, args.device, after_epoch=checkpoint)
    minutes = (time.perf_counter() - start) / 60
    save_model(model, tokenizer, args.out)

    scores = score(*load_model(str(args.out), args.device))
    for kind, value in scores.items():
        print(f"{kind}: {value:.4f}")
    today = datetime.date.today().isoformat()
    write_model_card(args.out, scores, recipe, minutes, today)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
