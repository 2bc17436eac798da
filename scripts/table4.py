"""Table 4 of the paper, the ablation from ReFT to BaFT, on any model and list of EasyEdit requests.

    python scripts/table4.py --model DIR --requests FILE.json --T 100
    python scripts/table4.py --gates --set lr=5.0e-4 --set rescaling=match-each-step

Every number comes from EasyEdit's evaluators; the continual scores are taken after the T-th edit.
Without `--requests` the bundled model's facts are edited.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from baft_easyedit.demo import bundled_presets, table
from baft_easyedit.easyedit.runner import run_methods
from baft_easyedit.facts import edit_requests
from baft_easyedit.gates import GATES

ROWS: dict[str, dict[str, Any]] = {
    "ReFT": {},
    "+ss-w": {"gate": "subspace", "balance": False, "locality": False},
    "+ba-w": {"locality": False},
    "+ss-w&lr": {"gate": "subspace", "balance": False},
    "BaFT": {},
}
"""The rows of Table 4: what each changes in BaFT's settings."""


def main() -> None:
    """Run the rows and print them as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="bundled", help="directory (%(default)s)")
    parser.add_argument("--requests", help="JSON list of EasyEdit requests; the facts if absent")
    parser.add_argument("--split", default="eval", help="of the facts: train or eval (%(default)s)")
    parser.add_argument("--start", type=int, default=0, help="first record (%(default)s)")
    parser.add_argument("--count", type=int, default=100, help="number of records (%(default)s)")
    parser.add_argument("--T", type=int, help="edits in a row; single edits if absent")
    parser.add_argument("--rows", default=",".join(ROWS), help="(%(default)s)")
    parser.add_argument("--gates", action="store_true", help="BaFT with every gate instead")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="in all rows"
    )
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--out", help="JSON file for the results")
    arguments = parser.parse_args()

    rows = {name: ROWS[name] for name in arguments.rows.split(",")}
    if arguments.gates:
        rows = {name: {"gate": name} for name in GATES if name not in ("one", "subspace")}
    common = {key: yaml.safe_load(value) for key, value in (s.split("=", 1) for s in arguments.set)}
    requests = records(arguments)
    results = [
        run_row(name, {**change, **common}, requests, arguments) for name, change in rows.items()
    ]
    for line in table(results):
        print(line)
    if arguments.out:
        content = [result.to_dict() for result in results]
        Path(arguments.out).write_text(json.dumps(content, indent=1), encoding="utf-8")


def records(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Read the chosen records."""
    if arguments.requests:
        chosen = json.loads(Path(arguments.requests).read_text(encoding="utf-8"))
    else:
        chosen = edit_requests(arguments.split)
    return chosen[arguments.start : arguments.start + arguments.count]


def run_row(
    name: str,
    change: dict[str, Any],
    requests: list[dict[str, Any]],
    arguments: argparse.Namespace,
) -> Any:
    """Run one row in its own process."""
    method = "ReFT" if name == "ReFT" else "BaFT"
    (result,) = run_methods(
        [method],
        arguments.model,
        requests,
        T=arguments.T,
        device=arguments.device,
        presets=bundled_presets(arguments.T),
        hparams={method: change},
    )
    return type(result)(**{**vars(result), "method": name})


if __name__ == "__main__":
    main()
