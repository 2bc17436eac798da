"""Run directories made up from random numbers, in the format of a benchmark.

    from synthetic import write_run
    run = write_run(tmp_path / "run", methods=("BaFT", "ReFT"), protocols=("single",), num_cases=4)

The numbers behave like real ones: old edits are forgotten, BaFT's basis weights are small on
unrelated prompts, summary rows are the means of the cases.
"""

import json
import math
from random import Random
from statistics import fmean

from baft_easyedit.bench.protocol import Chunk, Protocol
from baft_easyedit.bench.results import summarise
from baft_easyedit.bench.store import RunDirectory, file_name

# Rel, Gen, Loc and Por of a fresh edit; edits after which e^-1 of it is left; seconds; parameters.
QUALITIES = {
    "BaFT": (0.99, 0.94, 0.98, 0.45, 300, 300, 0.64, 28464),
    "ReFT": (0.99, 0.95, 0.93, 0.47, 250, 90, 0.35, 18480),
    "FT-L": (0.70, 0.62, 0.97, 0.30, 60, 80, 0.20, 98304),
    "FT-M": (0.99, 0.81, 0.98, 0.40, 180, 150, 0.15, 98304),
    "LoRA": (0.99, 0.97, 0.60, 0.42, 30, 25, 0.80, 55440),
    "AdaLoRA": (0.97, 0.93, 0.70, 0.41, 35, 30, 1.10, 60200),
    "ROME": (0.90, 0.80, 0.95, 0.44, 20, 30, 2.60, 98304),
    "MEMIT": (0.85, 0.75, 0.97, 0.43, 60, 70, 1.00, 196608),
    "WISE": (0.96, 0.79, 1.00, 0.38, 120, 400, 4.90, 294912),
    "GRACE": (1.00, 0.12, 1.00, 0.05, 900, 900, 1.70, None),
    "AlphaEdit": (0.93, 0.84, 0.95, 0.42, 150, 140, 1.30, 196608),
}
METHODS = tuple(QUALITIES)
LAYERS, RANK = (1, 3, 4, 5), 12
TEACHER_FORCED = ("rewrite_acc", "rephrase_acc", "locality_acc", "portability_acc")
SCORES = (*TEACHER_FORCED, *(f"gen_{name}" for name in TEACHER_FORCED))


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
    generation=True,
):
    """Write a run directory and return it.

    `rows` maps (method, protocol slug), or a method for all its rows, to summary fields that
    replace the made-up ones; a row with an `error` gets no cases. Slugs are `single`,
    `continual-T10`, `batched-B10-T10`.
    """
    rows, run = rows or {}, RunDirectory(directory)
    for method in methods:
        for slug in protocols:
            change = {**rows.get(method, {}), **rows.get((method, slug), {})}
            task = _task(slug) | {"method": method, "num_cases": num_cases}
            protocol = Protocol(task["T"], task["batch_size"])
            if change.get("error"):
                run.write_chunk(Chunk(method, protocol, 0, range(0)), change["error"])
                continue
            cases = _cases(task, Random(f"{method}{slug}{seed}"), portability, generation)
            folder = file_name(method)
            _write_all(directory / "cases" / folder / slug, "index", cases)
            _write_all(directory / "chunks" / folder / slug, "chunk", _chunks(task, cases))
    settings = [_task(slug) for slug in protocols]
    config = {"model": model, "data": {"kind": dataset}, "methods": list(methods), "seed": seed}
    for key in ("T", "batch_size"):
        config[key] = list(dict.fromkeys(task[key] for task in settings))
    write_json(run.config, config)  # JSON is YAML
    write_json(run.run, _run(num_cases, seed))
    write_json(run.requests, [])
    summary = summarise(run, dataset)
    for row in summary:
        slug = Protocol(row["T"], row["batch_size"]).slug
        row |= {**rows.get(row["method"], {}), **rows.get((row["method"], slug), {})}
    write_json(run.summary, summary)
    return directory


def write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_all(folder, key, contents):
    for content in contents:
        write_json(folder / f"{content[key]:05d}.json", content)


def _task(slug):
    protocol, *parts = slug.split("-")
    sizes = {part[0]: int(part[1:]) for part in parts}
    return {
        "slug": slug,
        "protocol": protocol,
        "T": sizes.get("T", 1),
        "batch_size": sizes.get("B", 1),
    }


def _cases(task, random, portability, generation):
    quality = QUALITIES.get(task["method"], QUALITIES["BaFT"])
    size = task["T"] * task["batch_size"]
    cases = []
    for index in range(task["num_cases"]):
        chunk, position = divmod(index, size)
        length = min(size, task["num_cases"] - chunk * size)
        age = 0 if task["protocol"] == "single" else (length - 1 - position) // task["batch_size"]
        kept = math.exp(-age / quality[4]) / (1 + 0.004 * (task["batch_size"] - 1))
        local = math.exp(-(length - 1) / 2 / quality[5])
        means = [quality[0] * kept, quality[1] * kept, quality[2] * local, quality[3] * kept]
        scores = [_score(random, mean) for mean in means]
        scores += [float(score > 0.5 and random.random() < 0.7) for score in scores]
        named = dict(zip(SCORES, scores, strict=True))
        if not generation:
            named |= dict.fromkeys(SCORES[4:])
        if not portability:
            named |= {"portability_acc": None, "gen_portability_acc": None}
        por, rel = named["portability_acc"], _score(random, quality[0])
        continual = task["protocol"] == "continual"
        named["immediate_rewrite_acc"] = rel if continual else None
        named["immediate_rephrase_acc"] = _score(random, quality[1]) if continual else None
        named["any_alias_portability_acc"] = None if por is None else min(1.0, por + 0.25)
        cases.append(_case(task, index, chunk, position, length, named, quality[6], random))
    return cases


def _score(random, mean):
    """Draw a share of three tokens."""
    return sum(random.random() < mean for _ in range(3)) / 3


def _case(task, index, chunk, position, length, scores, seconds, random):
    post = {
        "rewrite_acc": [scores["rewrite_acc"]],
        "rephrase_acc": [scores["rephrase_acc"]],
        "locality": {"neighborhood_acc": [scores["locality_acc"]]},
        "portability": {},
    }
    if scores["portability_acc"] is not None:
        post["portability"]["one_hop_acc"] = [scores["portability_acc"]]
    return {
        "schema": 1,
        "index": index,
        "case_id": index,
        "method": task["method"],
        "protocol": task["protocol"],
        "T": task["T"],
        "batch_size": task["batch_size"],
        "chunk": chunk,
        "position": position,
        "chunk_length": length,
        "edit_time_s": seconds * random.uniform(0.7, 1.4),
        "teacher_forced": {"pre": {"rewrite_acc": [0.0], "rephrase_acc": [0.0]}, "post": post},
        "scores": scores,
        **_basis(task["method"], random),
    }


def _basis(method, random):
    """Return a case's basis weights and the sizes of its update, for BaFT and ReFT."""
    if method not in ("BaFT", "ReFT"):
        return {"basis": None, "update": None}
    basis, update = {}, {}
    for prompt, openness in (("rewrite", 0.6), ("rephrase", 0.45), ("locality", 0.05)):
        basis[prompt], update[prompt] = {}, {}
        for layer in LAYERS:
            weights = [
                min(1.0, openness * (0.5 + 0.1 * (k % 5)) * random.uniform(0.5, 1.5))
                for k in range(RANK)
            ]
            weights = [1.0] * RANK if method == "ReFT" else weights
            sizes = [3.0 * math.exp(-0.35 * k) * random.uniform(0.6, 1.4) for k in range(RANK)]
            basis[prompt][str(layer)] = weights
            update[prompt][str(layer)] = [w * s for w, s in zip(weights, sizes, strict=True)]
    return {"basis": basis, "update": update}


def _chunks(task, cases):
    parameters = QUALITIES.get(task["method"], QUALITIES["BaFT"])[7]
    chunks = []
    for chunk in sorted({case["chunk"] for case in cases}):
        members = [case for case in cases if case["chunk"] == chunk]
        usage = None
        if members[0]["basis"]:
            usage = {
                layer: [
                    fmean(c["basis"]["rewrite"][layer][k] for c in members) for k in range(RANK)
                ]
                for layer in map(str, LAYERS)
            }
        chunks.append(
            {
                "schema": 1,
                "chunk": chunk,
                "indices": [case["index"] for case in members],
                "edit_times_s": [case["edit_time_s"] for case in members[:: task["batch_size"]]],
                "restored": True,
                "trainable_parameters": parameters,
                "peak_memory_bytes": 400_000_000,
                "notes": ["scored in eval mode"],
                "error": None,
                "downstream": None,
                "basis_usage": usage,
            }
        )
    return chunks


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
        "model": {"name": "llama-zsre", "model": "cd" * 32, "tokenizer": "ef" * 32},
        "data": {
            "kind": "zsre",
            "files": [{"name": "zsre_mend_edit.json", "sha256": "ab" * 32, "bytes": 12345}],
            "num_records": num_cases,
            "sha256": "12" * 32,
            "notes": [],
        },
    }
