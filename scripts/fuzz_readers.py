"""Feed damaged and hostile files to every reader, and see that each is read rightly or refused.

    python scripts/fuzz_readers.py --inputs 20000 --seed 0

Refused rightly is an OSError, or a ValueError or TypeError that our own code raises, in at most
2,000 characters that name the file. Anything else is a finding: another error, a wrong result, a
hang, something executed, or a file written outside the input's directory. The exit status is 1 if
there is a finding. `tests/test_files.py` puts what is no file before each reader. Linux only.
"""

import argparse
import json
import linecache
import os
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kill_test import ByteTokenizer, make_model
from safetensors.torch import load

import baft_easyedit
from baft_easyedit import BaFTEditor, BaFTHyperParams, ReFTHyperParams, attached_edit
from baft_easyedit.bench.config import make_config, read_config
from baft_easyedit.bench.data import load_dataset
from baft_easyedit.bench.diagnosis import diagnose
from baft_easyedit.bench.layouts import PaperNumbers, make_tables
from baft_easyedit.bench.results import read_run
from baft_easyedit.bench.tables import to_latex, to_markdown
from baft_easyedit.files.messages import MAX_MESSAGE
from baft_easyedit.hparams import read_hparams
from baft_easyedit.storage import state as states
from baft_easyedit.storage.reading import CHECKPOINTS, CONFIG, JOURNAL, STATE, read_history
from baft_easyedit.training.requests import EditRequest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = str(Path(baft_easyedit.__file__).parent)
LIMIT_S = 30
APART = {"min_similarity": 0.5}

TOKENS = (
    *(b"NaN", b"-1", b"1e999", b"9" * 5000, b"null", b'""', b"{}", b"\x00", b"\xff\xfe"),
    *(b'"\\ud800"', b"\xef\xbb\xbf", b"\r\n", b'"', b"[" * 3000, b'{"a":' * 2000),
)  # fmt: skip
YAML_TOKENS = (
    *(b"!!python/object/apply:os.system ['touch %s']", b"!!python/name:os.system ''", b"\t"),
    *(b"!!int 'x'", b"!!timestamp x", b"!!binary x", b"&a [*a]", b"*b", b"{<<: 3}", b"? [a]\n: b"),
    *(b"\n---\na: 1\n", b"2001-99-99", b"190:20:30", b"0x" + b"f" * 6000, b"!!set {a}"),
)  # fmt: skip
VALUES = (
    *(None, True, 0, -1, 2**64, 10**400, 1e308, float("nan"), float("inf"), 0.5, "", " ", "\ud800"),
    *("\x00", "long" * 20_000, "../../etc/passwd", "1e-4", [], {}, [None], {"": None}, ["a", 1]),
)

# ---- damage


def damaged_bytes(data: bytes, rng: random.Random, tokens: tuple[bytes, ...] = TOKENS) -> bytes:
    """Cut the end off, or replace a piece by a token, noise, copies of it, or nothing."""
    at, length = rng.randrange(len(data) + 1), rng.choice((0, 1, 1 << rng.randrange(10)))
    if rng.random() < 0.1:
        return data[:at]
    piece = data[at : at + length]
    news = (rng.choice(tokens), rng.choice(tokens), rng.randbytes(length or 1), piece * 3, b"")
    return data[:at] + rng.choice(news) + data[at + length :]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each object and list inside parsed JSON, with each of its keys."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def damaged_json(data: bytes, rng: random.Random, tokens: tuple[bytes, ...] = TOKENS) -> bytes:
    """Damage JSON as bytes, or a value or key of what it says."""
    if rng.random() < 0.4:
        return damaged_bytes(data, rng, tokens)
    content = json.loads(data)
    part, key = rng.choice([*places(content)])
    old = part[key]
    deep = old
    for _ in range(rng.choice((3, 150))):
        deep = [deep]
    new = rng.choice((rng.choice(VALUES), rng.choice(VALUES), {"a": old}, deep, [old] * 20))
    if isinstance(part, dict) and rng.random() < 0.2:
        del part[key]
        key = rng.choice(("", "extra", "\ud800", "long" * 20_000, key.upper()))
    part[key] = new
    text = json.dumps(content).encode()
    return text.replace(b"{", b'{"a": 1, "a": 2, ', 1) if rng.random() < 0.05 else text


def damaged_yaml(data: bytes, rng: random.Random) -> bytes:
    """Damage YAML; if it is JSON, also as what it says."""
    tokens = TOKENS[:9] + YAML_TOKENS * 2
    return (damaged_json if data[:1] == b"{" else damaged_bytes)(data, rng, tokens)


def damaged_journal(data: bytes, rng: random.Random) -> bytes:
    """Damage the bytes of a journal, or a line of it."""
    if rng.random() < 0.5:
        return damaged_bytes(data, rng)
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = damaged_json(lines[at], rng).replace(b", ", b",").replace(b": ", b":")
    return b"\n".join(lines) + b"\n"


def damaged_state(data: bytes, rng: random.Random) -> bytes:
    """Damage the bytes of a state file, or metadata whose hashes are then put right."""
    if rng.random() < 0.4:
        return damaged_bytes(data, rng)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    own = header["__metadata__"]
    name = rng.choice(states._KEYS)
    is_json = own[name][:1] in "{["
    own[name] = (
        damaged_json(own[name].encode(), rng).decode(errors="replace")
        if is_json and own[name] != "{}"
        else str(rng.choice(VALUES))
    )
    if name == "memory":
        try:
            state = states.EditState(load(data), own["attached"] == "true", json.loads(own[name]))
            then, own["state_hash"] = own["state_hash"], states.state_hash(state)
            own["entries"] = own["entries"].replace(then, own["state_hash"])
        except (ValueError, RecursionError):
            pass
    own["metadata_hash"] = states._metadata_hash(own)
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + data[end:]


# ---- readers


class Reader(NamedTuple):
    """One thing that is read."""

    name: str
    files: Mapping[str, bytes]
    """What is in the input's directory; the first file is damaged."""
    damage: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], None]
    """Reads an input's directory and checks what came of it."""


class WrongResultError(Exception):
    """A reader accepted what it should not."""


def expect(is_true: bool, what: str) -> None:
    """Raise WrongResultError unless something is so."""
    if not is_true:
        raise WrongResultError(what)


def kept_readers(folder: Path) -> Iterator[Reader]:
    """Yield the readers of a kept directory."""
    model, directory = make_model(), folder / "kept"
    hparams = BaFTHyperParams("t", [1], device="cpu", rank=2, num_steps=1, **APART)
    with BaFTEditor.open(model, ByteTokenizer(), directory, hparams) as editor:
        for i in range(3):
            editor.edit({"prompt": f"Fact {i} is", "target_new": "no", "loc_prompt": "Tea is hot"})
        editor.undo()
    editor.model_edit.detach()
    found = [file for file in directory.rglob("*") if file.is_file()]
    files = {file.relative_to(directory).as_posix(): file.read_bytes() for file in found}
    lines = files[JOURNAL].decode().splitlines()
    known = {entry.state_hash for entry in read_history(directory)}
    last = read_history(directory)[-1].state_hash

    def opened(path: Path, repair: bool = False) -> str:
        try:
            with BaFTEditor.open(model, ByteTokenizer(), path, repair=repair) as editor:
                return states.state_hash(editor._learner.state())
        finally:
            edit = attached_edit(model)
            if edit is not None:
                edit.detach()

    def open_kept(path: Path) -> None:
        history = read_history(path)
        expect(all(entry.summary().isprintable() for entry in history), "unprintable")
        told = [entry.line for entry in history]
        expect(told[:-1] == lines[: len(told[:-1])], "the history is another one")
        expect(opened(path) == last, "another state")
        now = (path / JOURNAL).read_text().splitlines()
        expect(now[: len(lines)] == lines, "the journal is another one")

    def repair_kept(path: Path) -> None:
        found = opened(path, repair=True)
        # One with right hashes looks as if its journal were lost: a new one says so.
        is_begun_anew = "snapshot_of" in read_history(path)[0].content
        expect(found in known or is_begun_anew, "a state that never was")
        expect(opened(path) == found, "another state after the repair")

    plain = {name: data for name, data in files.items() if CHECKPOINTS not in name}
    both = ((STATE, damaged_state), (JOURNAL, damaged_journal))
    for name, damage in (*both, (CONFIG, damaged_json)):
        yield Reader(name, {name: plain[name], **plain}, damage, open_kept)
    for name, damage in both:
        yield Reader("repair", {name: files[name], **files}, damage, repair_kept)


def yaml_readers() -> Iterator[Reader]:
    """Yield the readers of settings."""

    def read_ours(path: Path) -> None:
        hparams = read_hparams(path / "h.yaml")
        expect(type(hparams).from_dict(asdict(hparams)) == hparams, "hparams are not stable")

    def read_bench(path: Path) -> None:
        config = read_config(path / "b.yaml", {"T": [1]})
        expect(make_config(config.model_dump()) == config, "the configuration is not stable")

    ours = [*(ROOT / "hparams/BaFT").glob("*.yaml")][:3]
    presets = BaFTHyperParams.from_hparams("BaFT/facts-llama"), ReFTHyperParams("m", [1])
    settings = [*map(Path.read_bytes, ours), *(json.dumps(asdict(h)).encode() for h in presets)]
    row = {"name": "a", "method": "BaFT", "set": {"gate": "one"}}
    bench = {"model": "m", "data": {"kind": "zsre", "path": "d"}, "methods": ["ReFT", row]}
    bench |= {"T": [1, 2], "downstream": {"task": "p", "limit": 3}}
    benches = [*map(Path.read_bytes, (ROOT / "hparams/bench").glob("*.yaml"))]
    for data in settings:
        yield Reader("hparams", {"h.yaml": data}, damaged_yaml, read_ours)
    for data in (*benches, json.dumps(bench).encode()):
        yield Reader("bench settings", {"b.yaml": data}, damaged_yaml, read_bench)


def record_readers() -> Iterator[Reader]:
    """Yield the readers of benchmark records."""
    from tests.bench.dataset_files import RECORDS

    def reads(kind: str) -> Callable[[Path], None]:
        def read(path: Path) -> None:
            requests = load_dataset(kind, path / "r.json").requests
            for request in requests:
                EditRequest.from_dict(request)
            (path / "again.json").write_bytes(json.dumps(requests).encode())
            again = load_dataset("requests", path / "again.json").requests
            expect(again == requests, "other requests when read again")

        return read

    files = {kind: {"r.json": json.dumps(records).encode()} for kind, records in RECORDS.items()}
    irrelevant = [{"loc": "nq question: who wrote it", "loc_ans": " Ann "}]
    train = {"zsre_mend_train.json": json.dumps(irrelevant).encode()}
    for kind, own in files.items():
        others = train if kind == "zsre" else {}
        yield Reader(f"records: {kind}", own | others, damaged_json, reads(kind))
    yield Reader("records: zsre", train | files["zsre"], damaged_json, reads("zsre"))


def run_readers(folder: Path) -> Iterator[Reader]:
    """Yield the readers of a benchmark's directory."""
    from tests.bench.synthetic import write_run

    def read(path: Path) -> None:
        results = read_run(path).results
        for table in make_tables(results, PaperNumbers()):
            to_markdown(table)
            to_latex(table)
        diagnose(path).to_markdown()

    write_run(folder, methods=("BaFT", "ROME"), protocols=("single", "continual-T2"), num_cases=4)
    found = [file for file in folder.rglob("*") if file.is_file()]
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}
    name = "BaFT/continual-T2/00000.json"
    for own in ("run.json", "summary.json", f"chunks/{name}", f"cases/{name}"):
        yield Reader(f"run: {own}", {own: files[own], **files}, damaged_json, read)


# ---- the watch


class HangError(BaseException):
    """An input took too long."""


class Watch:
    """Sees what is executed, or written outside the directory `inside`."""

    EXECUTES = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.")
    WRITES = ("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.rename", "os.link")

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.inside: Path | None = None
        sys.addaudithook(self._hook)
        signal.signal(signal.SIGALRM, self._stop)

    def _stop(self, *_: Any) -> None:
        raise HangError

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        is_open = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        paths = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
        for path in paths if is_open or event in self.WRITES else ():
            place = Path(os.fsdecode(path)) if isinstance(path, str | os.PathLike) else self.inside
            place = place.resolve() if is_open else place.parent.resolve() / place.name
            if not place.is_relative_to(self.inside):
                self.seen.append(f"{event} {path!r}")
        if event.startswith(self.EXECUTES) and event != "socket.gethostname":
            self.seen.append(event)


def is_ours(error: BaseException) -> bool:
    """Tell whether a statement `raise` of our own code raised an error."""
    *_, (frame, number) = traceback.walk_tb(error.__traceback__)
    file = frame.f_code.co_filename
    line = linecache.getline(file, number).strip()
    return file.startswith(PACKAGE) and line.startswith("raise")


def outcome(reader: Reader, path: Path, watch: Watch) -> tuple[str, str]:
    """Read an input; return what came of it, and what is wrong with that."""
    result, wrong, watch.inside = "read", "", path.resolve()
    signal.alarm(LIMIT_S)
    try:
        reader.read(path)
    except HangError:
        result, wrong = "hang", f"more than {LIMIT_S} s"
    except Exception as error:  # noqa: BLE001
        result, text = type(error).__name__, str(error)
        is_refusal = type(error) in (ValueError, TypeError) and is_ours(error)
        is_named = any(name in text for name in (*reader.files, str(path)))
        if not is_refusal and not (isinstance(error, OSError) and text):
            wrong = f"{result}: {text[:200]}"
        elif not is_named:
            wrong = f"{result} without the file's name: {text[:200]}"
        elif len(text) > MAX_MESSAGE:
            wrong = f"{result} with a message of {len(text)} characters"
    finally:
        signal.alarm(0)
        watch.inside = None
    wrong += "; ".join(watch.seen)
    watch.seen.clear()
    return result, wrong


def run(inputs: int, seed: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Read so many inputs, the readers in turn; return outcomes by reader, and findings."""
    counts: dict[str, Counter[str]] = {}
    findings: list[str] = []
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        by_name: dict[str, list[Reader]] = {}
        runs = run_readers(root / "run")
        for reader in (*kept_readers(root), *yaml_readers(), *record_readers(), *runs):
            by_name.setdefault(reader.name, []).append(reader)
        canary = root / "canary"
        for i in range(inputs):
            rng = random.Random(f"{seed}/{i}")
            reader = rng.choice(by_name[list(by_name)[i % len(by_name)]])
            path = root / f"input-{i}"
            for name, data in reader.files.items():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(data)
            first = next(iter(reader.files))
            damaged = reader.damage(reader.files[first], rng).replace(b"%s", bytes(canary))
            (path / first).write_bytes(damaged)
            result, wrong = outcome(reader, path, watch)
            if canary.exists():
                wrong = f"{wrong} executed"
                canary.unlink()
            counts.setdefault(reader.name, Counter())[result] += 1
            if wrong:
                findings.append(f"{reader.name}, input {i}: {wrong} [{damaged[:60]!r}]")
    return counts, findings


def main() -> int:
    """Read the options, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))  # for the tests' records
    counts, findings = run(arguments.inputs, arguments.seed)
    for name, outcomes in counts.items():
        print(f"{name}: {', '.join(f'{what} {n}' for what, n in outcomes.most_common())}")
    for finding in findings[:50]:
        print(f"FINDING {finding}")
    print(f"{arguments.inputs} inputs, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
