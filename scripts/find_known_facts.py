"""Ask SmolLM2 for all facts, and write down which it knows: the splits `known` and `known_train`.

    python scripts/find_known_facts.py          # 12 minutes on one core

A fact is known in a phrasing if greedy decoding goes on with its answer. Questions are left out:
after one, the model goes on with other text, and in its chat template the answer is within a
sentence, where it cannot be told from one that is only mentioned.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from baft_easyedit.facts.tables import DATA, prompts_to_complete, tables_hash
from baft_easyedit.files.resources import REAL_MODEL, REAL_SHA256
from baft_easyedit.generation import load_model
from baft_easyedit.model.batching import padded
from baft_easyedit.model.prompt_format import token_ids

AT_ONCE = 32


def main() -> None:
    """Ask, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=DATA / "known.json", help="(%(default)s)")
    arguments = parser.parse_args()
    model, tokenizer = load_model(REAL_MODEL, arguments.device)
    asked = sorted(prompts_to_complete(), key=lambda a: len(f"{a.prompt} {a.answer}"))
    known: dict[int, list[int]] = {}
    right = answers_follow(model, tokenizer, [(a.prompt, a.answer) for a in asked])
    for one, is_right in zip(asked, right, strict=True):
        if is_right:
            known.setdefault(one.case, []).append(one.phrasing)
    in_order = {case: sorted(numbers) for case, numbers in sorted(known.items())}
    content = {"model": REAL_SHA256, "tables": tables_hash(), "known": in_order}
    arguments.out.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{len(known)} facts are known")


@torch.no_grad()
def answers_follow(model: Any, tokenizer: Any, asked: Sequence[tuple[str, str]]) -> list[bool]:
    """Tell for texts whether greedy decoding goes on with the answer, and ends its last word there.

    It takes one forward for each text, with its answer; what decoding would give is read off it.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        asked: Texts up to the answer, and the answers.
    """
    right = []
    for start in tqdm(range(0, len(asked), AT_ONCE)):
        part = asked[start : start + AT_ONCE]
        rows = [token_ids(f"{prompt} {answer}", tokenizer) for prompt, answer in part]
        lengths = [len(token_ids(prompt, tokenizer)) for prompt, _ in part]
        inputs = padded(rows, tokenizer, "right")
        # Only where answers are predicted: logits of whole texts take much memory.
        hidden = model.base_model(**inputs).last_hidden_state  # [B, T, D]
        for row, length, states in zip(rows, lengths, hidden, strict=True):
            best = model.lm_head(states[length - 1 : len(row)]).argmax(-1).tolist()
            told, longer = tokenizer.decode(row), tokenizer.decode([*row, best[-1]])
            is_whole = not longer[len(told) :][:1].isalnum()
            right.append(best[:-1] == list(row[length:]) and is_whole)
    return right


if __name__ == "__main__":
    main()
