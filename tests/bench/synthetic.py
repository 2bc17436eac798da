"""Run directories made up from random numbers, in the format of a benchmark.

    from synthetic import write_run
    run = write_run(tmp_path / "run", methods=("BaFT", "ReFT"), protocols=("single",), num_cases=4)

Basis weights are small on unrelated prompts, and summary rows are the means of the cases.
"""

from random import Random
from statistics import fmean

from baft_easyedit.bench.protocol import Protocol, chunks_of
from baft_easyedit.bench.results import summarise
from baft_easyedit.bench.scores import SCORES
from baft_easyedit.bench.store import RunDirectory, write_json

METHODS = (
    *("BaFT", "ReFT", "FT-L", "FT-M", "LoRA", "AdaLoRA", "ROME", "MEMIT", "WISE", "GRACE"),
    "AlphaEdit",
)
LAYERS, RANK = ("1", "3", "4", "5"), 12
KINDS = {"rewrite": 0.6, "rephrase": 0.45, "locality": 0.05}
"""How far BaFT's gate opens on each kind of prompt."""


def write_run(
    directory,
    rows=None,
    methods=METHODS,
    protocols=("single", "continual-T10", "continual-T100"),
    num_cases=100,
    seed=0,
    model="llama-zsre",
    dataset="zsre",
    portability=True,
):
    """Write a run directory and return it.

    `rows` maps (method, protocol slug), or a method for all its rows, to summary fields that
    replace the made-up ones; a row with an `error` gets no cases. Slugs are `single`,
    `continual-T10`, `batched-B10-T10`.
    """
    rows, run = rows or {}, RunDirectory(directory)
    settings = [_protocol(slug) for slug in protocols]
    for method in methods:
        for protocol in settings:
            change = {**rows.get(method, {}), **rows.get((method, protocol.slug), {})}
            random = Random(f"{method}{protocol.slug}{seed}")
            for chunk in chunks_of(method, protocol, num_cases):
                if change.get("error"):
                    run.write_chunk(chunk, change["error"])
                else:
                    _write_chunk(run, chunk, random, portability)
    config = {"model": model, "data": {"kind": dataset}, "methods": list(methods), "seed": seed}
    for key in ("T", "batch_size"):
        config[key] = list(dict.fromkeys(getattr(protocol, key) for protocol in settings))
    write_json(run.config, config)  # JSON is YAML
    write_json(run.run, _run(num_cases, seed))
    write_json(run.requests, [])
    summary = summarise(run)
    for row in summary:
        slug = Protocol(row["T"], row["batch_size"]).slug
        row |= {**rows.get(row["method"], {}), **rows.get((row["method"], slug), {})}
    write_json(run.summary, summary)
    return directory


def _protocol(slug):
    sizes = {part[0]: int(part[1:]) for part in slug.split("-")[1:]}
    return Protocol(sizes.get("T", 1), sizes.get("B", 1))


def _write_chunk(run, chunk, random, portability):
    cases = []
    for position, index in enumerate(chunk.indices):
        case = {
            "schema": 1,
            "index": index,
            "method": chunk.method,
            "T": chunk.protocol.T,
            "batch_size": chunk.protocol.batch_size,
            "chunk": chunk.number,
            "position": position,
            "chunk_length": len(chunk.indices),
            "scores": _scores(chunk.protocol.name == "continual", random, portability),
            **_basis(chunk.method, random),
        }
        write_json(run.case(chunk.method, chunk.protocol, index), case)
        cases.append(case)
    usage = {
        layer: [fmean(of_basis) for of_basis in zip(*weights, strict=True)]
        for layer in LAYERS
        if (weights := [case["basis"]["rewrite"][layer] for case in cases if case["basis"]])
    }
    run.write_chunk(
        chunk,
        edit_times_s=[random.uniform(0.4, 0.9) for _ in cases],
        restored=True,
        trainable_parameters=28464,
        peak_memory_bytes=400_000_000,
        notes=["scored in eval mode"],
        basis_usage=usage or None,
    )


def _scores(is_continual, random, portability):
    """Draw shares of three tokens."""
    found = {name: random.randint(1, 3) / 3 for name in SCORES}
    if not is_continual:
        found |= {name: None for name in SCORES if name.startswith("immediate")}
    if not portability:
        found |= {name: None for name in SCORES if "portability" in name}
    return found


def _basis(method, random):
    """Return a case's basis weights and the sizes of its update, for BaFT and ReFT."""
    if method not in ("BaFT", "ReFT"):
        return {"basis": None, "update": None}

    def drawn(openness):
        return [openness * (0.5 + 0.1 * (k % 5)) * random.uniform(0.5, 1.5) for k in range(RANK)]

    basis = {kind: {layer: drawn(openness) for layer in LAYERS} for kind, openness in KINDS.items()}
    return {"basis": basis, "update": basis}


def _run(num_cases, seed):
    return {
        "schema": 1,
        "command": ["baft-easyedit", "bench", "zsre_continual.yaml"],
        "status": "success",
        "date": "2026-01-02T03:04:05+00:00",
        "seed": seed,
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.5.4"},
        "easyedit": {"generation": "current", "version": "14cea82"},
        "hardware": {"machine": "x86_64", "cpus": 2, "gpus": []},
        "model": {"name": "llama-zsre", "model": "cd" * 32},
        "data": {
            "kind": "zsre",
            "files": [{"name": "zsre_mend_edit.json", "sha256": "ab" * 32, "bytes": 12345}],
            "num_records": num_cases,
            "sha256": "ef" * 32,
            "notes": [],
        },
        "inputs": {},
        "earlier": [],
    }
