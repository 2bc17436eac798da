"""Edit one model thousands of times in a row, kept on the disk, and check that nothing grows.

    python scripts/soak.py --model DIR --data FILE.json --edits 5000 --out DIR

The records are edited in turn, each time round with other targets. Every 100 edits a line of
OUT/soak.jsonl tells the memory, the seconds per edit, the size of the journal, and whether model,
state file and journal agree. In the end:

    memory flat     since the first 2,000 edits, the resident memory
                    has grown by at most 5 %, and by at most 4 KiB an edit, for the journal's lines
                    are kept in memory
    time flat       the median edit of the last 100 takes at most 1.25 times the CPU time of that
                    of the second 100
    all kept        the journal has every edit, in order
    reopened        another process loads the newest state, and it and the logits are bit-equal
    rolled back     a random earlier checkpoint is gone back to, with the hash in the journal

Linux only. The exit status is 1 if a check fails.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from baft_easyedit import BaFTEditor, BaFTHyperParams
from baft_easyedit.generation import load_model
from baft_easyedit.storage.reading import JOURNAL, STATE, read_history
from baft_easyedit.storage.state import read_state

EVERY = 100
APART = {"min_similarity": 0.75}
WARM_UP = 2000
KIB_PER_EDIT = 4.0
SLOWER = 1.25


def requests_of(records: Sequence[dict[str, Any]], edits: int) -> Iterator[dict[str, Any]]:
    """Yield requests: the records in turn, each time round with the targets of others."""
    for i in range(edits):
        turn, at = divmod(i, len(records))
        yield {**records[at], "target_new": records[(at + turn) % len(records)]["target_new"]}


def resident_mib() -> float:
    """Return the memory that this process has in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@torch.no_grad()
def digest(model: Any, tokenizer: Any) -> str:
    """Return a hash of what a model computes."""
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    return hashlib.sha256(model(ids.to(model.device)).logits.float().cpu().numpy()).hexdigest()


def is_consistent(editor: BaFTEditor, directory: Path) -> bool:
    """Tell whether the model, the state file and the journal are of the same change."""
    kept, learned = read_state(directory / STATE), editor.model_edit.snapshot()
    with open(directory / JOURNAL, "rb") as stream:
        stream.seek(-len(kept.entries[-1].line) - 1, os.SEEK_END)
        last = stream.read().decode().rstrip("\n")
    return last == kept.entries[-1].line and all(
        torch.equal(value.cpu(), kept.state.learned[name]) for name, value in learned.items()
    )


def edit_all(editor: BaFTEditor, requests: Iterator[dict[str, Any]], out: Path) -> list[Any]:
    """Make all edits; return, and write, a record for every hundred."""
    records: list[Any] = []
    times: list[float] = []
    cpu_times: list[float] = []
    with open(out / "soak.jsonl", "w", encoding="utf-8") as stream:
        for count, request in enumerate(requests, 1):
            start, cpu_start = time.perf_counter(), time.process_time()
            editor.edit(request)
            times.append(time.perf_counter() - start)
            cpu_times.append(time.process_time() - cpu_start)
            if count % EVERY == 0:
                record = {
                    "edits": count,
                    "rss_mib": round(resident_mib(), 1),
                    "median_ms": round(1000 * statistics.median(times), 1),
                    "median_cpu_ms": round(1000 * statistics.median(cpu_times), 1),
                    "slowest_ms": round(1000 * max(times), 1),
                    "journal_mib": round((out / "kept" / JOURNAL).stat().st_size / 2**20, 2),
                    "is_consistent": is_consistent(editor, out / "kept"),
                }
                print(json.dumps(record), file=stream, flush=True)
                records.append(record)
                times.clear()
                cpu_times.clear()
    return records


def reopened(arguments: argparse.Namespace) -> str:
    """Return what another process computes with the newest state."""
    command = [sys.executable, __file__, "--model", arguments.model, "--device", arguments.device]
    command += ["--digest", str(arguments.out / "kept")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.split()[-1]


def is_flat(records: Sequence[Any]) -> dict[str, bool]:
    """Compare the last hundred edits with the first ones."""
    first, last = records[min(1, len(records) - 1)], records[-1]
    warm = records[min(WARM_UP // EVERY, len(records)) - 1]
    grown = last["rss_mib"] - warm["rss_mib"]
    allowed = min(0.05 * warm["rss_mib"], KIB_PER_EDIT * (last["edits"] - warm["edits"]) / 1024)
    return {
        "memory flat": grown <= allowed,
        "time flat": last["median_cpu_ms"] <= SLOWER * first["median_cpu_ms"],
    }


def soak(arguments: argparse.Namespace) -> dict[str, bool]:
    """Make the edits and all checks."""
    kept: Path = arguments.out / "kept"
    model, tokenizer = load_model(arguments.model, arguments.device)
    hparams = BaFTHyperParams(
        arguments.model,
        arguments.layers,
        device=arguments.device,
        rank=arguments.rank,
        num_steps=arguments.steps,
        **(APART if arguments.own_bases else {}),
    )
    requests = list(requests_of(json.loads(arguments.data.read_text()), arguments.edits))
    with BaFTEditor.open(model, tokenizer, kept, hparams) as editor:
        records = edit_all(editor, iter(requests), arguments.out)
        computed = digest(model, tokenizer)
    history = read_history(kept)
    edited = [(r["prompt"], r["target_new"]) for e in history[1:] for r in e.requests]
    checks = {
        "all consistent": all(record["is_consistent"] for record in records),
        **is_flat(records),
        "all kept": edited == [(r["prompt"], r["target_new"]) for r in requests],
        "reopened": reopened(arguments) == computed,
    }
    model, tokenizer = load_model(arguments.model, arguments.device)
    with BaFTEditor.open(model, tokenizer, kept) as editor:
        to = EVERY * random.Random(arguments.seed).randrange(arguments.edits // EVERY)
        editor.rollback(to=to)
    now = read_state(kept / STATE).entries[-1]
    checks["rolled back"] = now.to == to and now.state_hash == history[to].state_hash
    return checks


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="name or directory (%(default)s)")
    parser.add_argument("--data", type=Path, help="JSON list of EasyEdit's request dicts")
    parser.add_argument("--edits", type=int, default=5000, help="at least 100 (%(default)s)")
    parser.add_argument("--out", type=Path, help="a new directory")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3, 4, 5], help="(%(default)s)")
    parser.add_argument("--rank", type=int, default=12, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="of each edit (%(default)s)")
    parser.add_argument("--own-bases", action="store_true", help="of each edit: memory grows")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the rollback (%(default)s)")
    parser.add_argument("--digest", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.digest is None:
        if not (arguments.data and arguments.out) or arguments.edits < EVERY:
            parser.error(f"--data, --out, and at least {EVERY} --edits are needed")
        arguments.out.mkdir(parents=True)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and print what was found."""
    arguments = parse(argv)
    if arguments.digest is not None:
        model, tokenizer = load_model(arguments.model, arguments.device)
        BaFTEditor.load(model, tokenizer, arguments.digest)
        print(digest(model, tokenizer))
        return 0
    checks = soak(arguments)
    lines = (arguments.out / "soak.jsonl").read_text().splitlines()
    for line in [*lines[:2], *lines[2:][-2:]]:
        print(line)
    for name, is_true in checks.items():
        print(f"{name}: {'yes' if is_true else 'NO'}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
