"""Ask SmolLM2 for all facts, and write down which it knows: the splits `known` and `known_train`.

    python scripts/find_known_facts.py          # 12 minutes on one core

A fact is known in a phrasing if greedy decoding goes on with its answer. Questions are left out:
after one, the model goes on with other text, and in its chat template the answer is within a
sentence, where it cannot be told from one that is only mentioned.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from baft_easyedit.facts.evaluation import answers_follow
from baft_easyedit.facts.known import prompts_to_complete, write_known
from baft_easyedit.files.resources import REAL_MODEL, REAL_SHA256
from baft_easyedit.generation import load_model

CHUNK = 320


def main() -> None:
    """Ask, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="the package's own file if absent")
    arguments = parser.parse_args()
    model, tokenizer = load_model(REAL_MODEL, arguments.device)
    asked = sorted(prompts_to_complete(), key=lambda a: len(f"{a.prompt} {a.answer}"))
    known: dict[int, list[int]] = {}
    for start in tqdm(range(0, len(asked), CHUNK)):
        part = asked[start : start + CHUNK]
        right = answers_follow(model, tokenizer, [(a.prompt, a.answer) for a in part])
        for one, is_right in zip(part, right, strict=True):
            if is_right:
                known.setdefault(one.case, []).append(one.phrasing)
    in_order = {case: sorted(numbers) for case, numbers in sorted(known.items())}
    write_known(in_order, REAL_SHA256, arguments.out)
    print(f"{len(known)} facts are known")


if __name__ == "__main__":
    main()
