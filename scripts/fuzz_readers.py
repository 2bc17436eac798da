"""Feed damaged and hostile files to every reader, and see that each is read rightly or refused.

    python scripts/fuzz_readers.py --inputs 20000 --seed 0

Refused rightly is an OSError, or a ValueError or TypeError that our own code raises and that names
the file. Anything else is a finding: another error, a wrong result, a hang, something executed, or
a file written outside the input's directory. So is a message of more than 2,000 characters, and
more than 2 GiB of memory. Some inputs are no files: FIFOs, sockets, devices, directories, links.
The exit status is 1 if there is a finding. Linux only.
"""

import argparse
import base64
import json
import linecache
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load
from transformers import LlamaConfig, LlamaForCausalLM

import baft_easyedit
from baft_easyedit import BaFTEditor, BaFTHyperParams, ReFTHyperParams, attach, attached_edit
from baft_easyedit.bench.config import make_config, read_config
from baft_easyedit.bench.data import load_dataset
from baft_easyedit.files.messages import MAX_MESSAGE
from baft_easyedit.files.paths import read_regular
from baft_easyedit.files.reading import parse_object
from baft_easyedit.hparams import read_hparams
from baft_easyedit.storage import state as state_module
from baft_easyedit.storage.config import KeptConfig
from baft_easyedit.storage.reading import (
    CHECKPOINTS,
    CONFIG,
    JOURNAL,
    STATE,
    read_history,
)
from baft_easyedit.storage.state import read_state
from baft_easyedit.training.rehearsal import RehearsalMemory
from baft_easyedit.training.requests import EditRequest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = str(Path(baft_easyedit.__file__).parent)
LIMIT_S = 5.0
WAIT_S = 30.0
LIMIT_BYTES = 2**31

# ---- damage

TOKENS = (
    *(b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 5000, b"null", b"true", b'""', b"[]", b"{}"),
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"\\ud800"', b"\r\n", b"\n", b'"'),
    *(b"[" * 3000, b"[" * 120 + b"]" * 120, b'{"a":' * 2000, b"\\u0000", b"\x1b[2J"),
)
YAML_TOKENS = (
    *(b"!!python/object/apply:os.system ['touch %s']", b"!!python/name:os.system ''"),
    *(b"!!python/object/new:subprocess.Popen [['touch', '%s']]", b"!!python/module:os ''"),
    *(b"!!int ''", b"!!int 'x'", b"!!float ''", b"!!bool 'x'", b"!!timestamp x", b"!!binary x"),
    *(b"&a [*a]", b"*b", b"{<<: 3}", b"? [a]\n: b", b"\n---\na: 1\n", b"\t", b"2001-99-99", b"1e4"),
    *(b"190:20:30", b"0x" + b"f" * 6000, b"%YAML 9.9\n---\n", b"!!set {a}", b"!!omap [a]", b": :"),
    b"{a0: &a0 [x,x,x,x,x,x,x,x,x], "
    + b", ".join(b"a%d: &a%d [" % (i, i) + b",".join([b"*a%d" % (i - 1)] * 9) + b"]"
                 for i in range(1, 12))
    + b"}",
)  # fmt: skip
VALUES = (
    *(
        None,
        True,
        False,
        0,
        -1,
        2,
        2**63,
        2**64,
        10**400,
        -(10**4200),
        1e308,
        float("nan"),
        float("inf"),
        0.5,
    ),
    *(
        "",
        " ",
        "x",
        "\ud800",
        "a\udfffb",
        "\x00",
        "é" * 300,
        "long" * 20_000,
        "../../etc/passwd",
        "/etc/passwd",
        "BaFT",
        "1e-4",
    ),
    *([], {}, [[]], [None], {"": None}, ["a", 1], {"a": {"b": []}}),
)


def damaged_bytes(data: bytes, rng: random.Random, tokens: tuple[bytes, ...] = TOKENS) -> bytes:
    """Flip, cut, insert, repeat or remove."""
    at, length = rng.randrange(len(data) + 1), 1 << rng.randrange(10)
    kind = rng.choice(("flip", "cut", "token", "noise", "repeat", "remove", "swap"))
    if kind == "flip" and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "token":
        return data[:at] + rng.choice(tokens) + data[at + rng.choice((0, 0, 1, length)) :]
    if kind == "noise":
        return data[:at] + rng.randbytes(length) + data[at + rng.choice((0, length)) :]
    if kind == "repeat":
        return data[:at] + data[at : at + length] * rng.choice((2, 3, 50)) + data[at + length :]
    other = rng.randrange(len(data) + 1)
    moved = b"" if kind == "remove" else data[other : other + length]
    return data[:at] + moved + data[at + length :]


def damaged_value(value: Any, rng: random.Random) -> Any:
    """Change one value, key or entry of parsed JSON, in place where it can be."""
    places: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        part = stack.pop()
        if isinstance(part, dict | list):
            keys = list(part) if isinstance(part, dict) else range(len(part))
            places += [(part, key) for key in keys]
            stack += [part[key] for key in keys]
    if not places or rng.random() < 0.02:
        return deepcopy(rng.choice(VALUES))
    part, key = rng.choice(places)
    kinds = ("value", "value", "value", "other", "remove", "wrap", "deep", "name", "many")
    kind = rng.choice(kinds if len(places) < 300 else kinds[:-1])  # much of much is too much
    if kind == "value":
        part[key] = deepcopy(rng.choice(VALUES))
    elif kind == "other":
        from_part, from_key = rng.choice(places)
        part[key] = json.loads(json.dumps(from_part[from_key]))
    elif kind == "remove":
        del part[key]
    elif kind == "wrap":
        part[key] = [part[key]] if rng.random() < 0.5 else {"a": part[key]}
    elif kind == "deep":
        for _ in range(rng.choice((3, 90, 150))):
            part[key] = [part[key]] if rng.random() < 0.5 else {"a": part[key]}
    elif kind == "many":
        part[key] = [part[key]] * rng.choice((2, 2000))
    elif isinstance(part, dict):
        names = (*map(str, VALUES[:3]), "", "extra", "\ud800", "long" * 20_000)
        part[rng.choice(names)] = part.pop(key)
    return value


def damaged_json(data: bytes, rng: random.Random, tokens: tuple[bytes, ...] = TOKENS) -> bytes:
    """Damage JSON as bytes, or as what it says, once or more."""
    if rng.random() < 0.4:
        return damaged_bytes(data, rng, tokens)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        value = damaged_value(value, rng)
    text = json.dumps(value)
    return (with_doubled_key(text, rng) if rng.random() < 0.1 else text).encode()


def with_doubled_key(text: str, rng: random.Random) -> str:
    """Give an object of some JSON its first key twice."""
    objects = list(re.finditer(r'\{("(?:[^"\\]|\\.)*"):', text))
    if not objects:
        return text
    chosen = rng.choice(objects)
    other = rng.choice(("null", "1", chosen[1], "{}"))
    return f"{text[: chosen.start()]}{{{chosen[1]}: {other}, {text[chosen.start() + 1 :]}"


def put_special(file: Path, rng: random.Random) -> str:
    """Put what is no regular file in the place of a file; return what it is."""
    kinds = ("FIFO", "socket", "directory", "itself", "nowhere", "/dev/zero", "/proc/self/mem")
    kind = rng.choice(kinds)
    file.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(file))
    elif kind == "directory":
        file.mkdir()
        (file / "something").write_text("of value")
    else:
        file.symlink_to(file if kind == "itself" else kind)
    return kind


def damaged_state(data: bytes, rng: random.Random) -> bytes:
    """Damage a state file: its bytes, its header, or metadata whose hashes are then put right."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = rng.choice(("bytes", "header", "metadata", "metadata", "body", "length"))
    if kind == "bytes":
        return damaged_bytes(data, rng)
    if kind == "length":
        return rng.choice((0, 1, length + 1, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little") + data
    if kind == "body":
        return data[: 8 + length] + damaged_bytes(body, rng)
    if kind == "header":
        header = damaged_json(header, rng)
    else:
        content = json.loads(header)
        own = content["__metadata__"]
        name = rng.choice([key for key in own if key != "metadata_hash"])
        own[name] = (
            damaged_json(own[name].encode(), rng).decode(errors="replace")
            if own[name][:1] in "{["
            else str(rng.choice(VALUES))
        )
        if rng.random() < 0.5 and name == "memory":
            learned, attached = load(data), own["attached"] == "true"
            try:
                memory = json.loads(own[name])
                state = state_module.EditState(learned, attached, memory)
                then, own["state_hash"] = own["state_hash"], state_module.state_hash(state)
                own["entries"] = own["entries"].replace(then, own["state_hash"])
            except (ValueError, RecursionError):
                pass
        own["metadata_hash"] = state_module._metadata_hash(own)
        header = json.dumps(content).encode()
    return len(header).to_bytes(8, "little") + header + body


# ---- readers


class Reader(NamedTuple):
    """One thing that is read."""

    name: str
    file: str
    """What is damaged, in the input's directory."""
    data: bytes
    damage: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], None]
    """Reads an input's directory and checks what came of it."""
    others: Mapping[str, bytes] = MappingProxyType({})
    """What else is in the directory."""


def is_own(file: Path) -> bool:
    """Tell whether a name is that of a regular file, not of a link to one."""
    return file.is_file() and not file.is_symlink()


class WrongResultError(Exception):
    """A reader accepted what it should not."""


def expect(is_true: bool, what: str) -> None:
    """Raise WrongResultError unless something is so."""
    if not is_true:
        raise WrongResultError(what)


class ByteTokenizer:
    """A token for each byte."""

    pad_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Return the ids of a text."""
        return {"input_ids": [1, *text.encode()]}


def make_model() -> Any:
    """Return a tiny random model."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_hidden_layers=3)).eval()


def kept_readers(folder: Path) -> Iterator[Reader]:
    """Yield the readers of a kept directory."""
    model, directory = make_model(), folder / "kept"
    hparams = BaFTHyperParams("t", [1], device="cpu", rank=2, num_steps=1, rehearsal=1)
    with BaFTEditor.open(model, ByteTokenizer(), directory, hparams) as editor:
        for i in range(3):
            editor.edit({"prompt": f"Fact {i} is", "target_new": "no", "loc_prompt": "Tea is hot"})
        editor.undo()
    memory = editor.model_edit.memory.state()
    editor.model_edit.detach()
    files = {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}
    lines = files[JOURNAL].decode().splitlines()
    kept_hash = read_state(directory / STATE).entries[-1].state_hash
    known = {entry.state_hash for entry in read_history(directory)}
    folder = directory / CHECKPOINTS
    checkpoints = {f"{CHECKPOINTS}/{f.name}": f.read_bytes() for f in folder.iterdir()}

    def read_kept(path: Path) -> None:
        try:
            attach(model, path)
        finally:
            edit = attached_edit(model)
            if edit is not None:
                edit.detach()

    def open_kept(path: Path) -> None:
        opened = None
        try:
            history = read_history(path)
            expect(all(entry.summary().isprintable() for entry in history), "unprintable")
            told = [entry.line for entry in history]
            expect(told[:-1] == lines[: len(told[:-1])], "the history is another one")
            is_whole = len(told) == len(lines) or not is_own(path / STATE)  # which has the end
            expect(is_whole, "the history has no end")
            opened = BaFTEditor.open(model, ByteTokenizer(), path)
            expect(state_module.state_hash(opened._learner.state()) == kept_hash, "another state")
            now = (path / JOURNAL).read_text().splitlines()
            expect(now[: len(lines)] == lines, "the journal is another one")
        finally:
            if opened is not None:
                opened.close()
            edit = attached_edit(model)
            if edit is not None:
                edit.detach()

    def repair_kept(path: Path) -> None:
        before = {
            name: (path / name).read_bytes() for name in (STATE, JOURNAL) if is_own(path / name)
        }
        if JOURNAL in before:  # an unfinished last line was never committed
            before[JOURNAL] = before[JOURNAL][: before[JOURNAL].rfind(b"\n") + 1]
        whole = None
        with suppress(Exception):
            whole = read_state(path / STATE).entries[-1].state_hash
        try:
            with BaFTEditor.open(model, ByteTokenizer(), path, repair=True) as editor:
                found = state_module.state_hash(editor._learner.state())
                if found == whole:  # the edit goes on from it, with the settings it has
                    before.pop(STATE, None)
                # One with right hashes looks as if its journal were lost: a new one says so.
                is_begun_anew = read_history(path)[0].snapshot_of is not None
                expect(found in known or is_begun_anew, "a state that never was")
                own = attached_edit(model)
                if own is not None:
                    own.detach()
            with BaFTEditor.open(model, ByteTokenizer(), path) as editor:
                again = state_module.state_hash(editor._learner.state())
                expect(again == found, "another state after the repair")
            now = [file.read_bytes() for file in path.rglob("*") if is_own(file)]
            for name, data in before.items():
                expect(any(other.startswith(data) for other in now), f"{name} is lost")
        finally:
            edit = attached_edit(model)
            if edit is not None:
                edit.detach()

    def read_config_file(path: Path) -> None:
        where = str(path / CONFIG)
        config = KeptConfig.from_json(parse_object(read_regular(path / CONFIG), where), where)
        json.dumps(config.to_json())
        open_kept(path)

    def restore_memory(path: Path) -> None:
        restored = RehearsalMemory()
        restored.restore(json.loads((path / "memory.json").read_bytes()))
        again = RehearsalMemory()
        again.restore(restored.state())
        expect(again.state() == restored.state(), "the memory does not come back")

    def rest(name: str) -> dict[str, bytes]:
        return {key: value for key, value in files.items() if key != name}

    yield Reader("state file", STATE, files[STATE], damaged_state, read_kept, rest(STATE))
    yield Reader("journal", JOURNAL, files[JOURNAL], damaged_journal, open_kept, rest(JOURNAL))
    yield Reader("config", CONFIG, files[CONFIG], damaged_json, read_config_file, rest(CONFIG))
    for name, damage in ((STATE, damaged_state), (JOURNAL, damaged_journal)):
        yield Reader("repair", name, files[name], damage, repair_kept, rest(name) | checkpoints)
    data = json.dumps(memory).encode()
    yield Reader("rehearsal memory", "memory.json", data, damaged_object, restore_memory)


def damaged_object(data: bytes, rng: random.Random) -> bytes:
    """Damage a JSON object so that it is one still, as only such come to a memory."""
    while True:
        damaged = json.dumps(damaged_value(json.loads(data), rng)).encode()
        if damaged[:1] == b"{":
            return damaged


def damaged_journal(data: bytes, rng: random.Random) -> bytes:
    """Damage the bytes of a journal, or a line of it."""
    if rng.random() < 0.5:
        return damaged_bytes(data, rng)
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    if rng.random() < 0.2:
        lines.insert(at, lines.pop(rng.randrange(len(lines))))
    else:
        lines[at] = damaged_json(lines[at], rng).replace(b", ", b",").replace(b": ", b":")
    return b"\n".join(lines) + b"\n"


def yaml_readers() -> Iterator[Reader]:
    """Yield the readers of settings."""

    def as_yaml(data: bytes, rng: random.Random) -> bytes:
        return damaged_json(data, rng, TOKENS[:9] + YAML_TOKENS * 2)

    def text_yaml(data: bytes, rng: random.Random) -> bytes:
        return damaged_bytes(data, rng, TOKENS + YAML_TOKENS * 2)

    def check(hparams: BaFTHyperParams) -> None:
        expect(type(hparams).from_dict(asdict(hparams)) == hparams, "hparams are not stable")

    def read_ours(path: Path) -> None:
        check(read_hparams(path / "h.yaml"))
        check(BaFTHyperParams.from_hparams(path / "h.yaml"))

    def read_bench(path: Path) -> None:
        config = read_config(path / "b.yaml", {"T": [1]})
        expect(make_config(config.model_dump()) == config, "the configuration is not stable")

    content = asdict(BaFTHyperParams.from_hparams("BaFT/facts-llama"))
    yield Reader("hparams", "h.yaml", json.dumps(content).encode(), as_yaml, read_ours)
    reft = {**content, **asdict(ReFTHyperParams("m", [1])), "device": "cpu"}
    yield Reader("hparams", "h.yaml", json.dumps(reft).encode(), as_yaml, lambda path: check(
        ReFTHyperParams.from_hparams(path / "h.yaml")))  # fmt: skip
    for file in sorted((ROOT / "hparams").glob("BaFT/*.yaml"))[:3]:
        yield Reader("hparams", "h.yaml", file.read_bytes(), text_yaml, read_ours)
    for file in sorted((ROOT / "hparams/bench").glob("*.yaml")):
        yield Reader("bench settings", "b.yaml", file.read_bytes(), text_yaml, read_bench)
    row = {"name": "a", "method": "BaFT", "set": {"gate": "one"}}
    bench = {"model": "m", "data": {"kind": "zsre", "path": "d"}, "methods": ["ReFT", row]}
    bench |= {"T": [1, 2], "downstream": {"task": "p", "limit": 3}}
    yield Reader("bench settings", "b.yaml", json.dumps(bench).encode(), as_yaml, read_bench)


def record_readers() -> Iterator[Reader]:
    """Yield the readers of benchmark records."""
    sys.path.insert(0, str(ROOT))
    from tests.bench.dataset_files import RECORDS

    def reads(kind: str) -> Callable[[Path], None]:
        def read(path: Path) -> None:
            found = load_dataset(kind, path / "r.json")
            for request in found.requests:
                EditRequest.from_dict(request)
                json.dumps(request).encode()

        return read

    irrelevant = [{"loc": "nq question: who wrote it", "loc_ans": " Ann "}]
    train = {"zsre_mend_train.json": json.dumps(irrelevant).encode()}
    for kind, records in RECORDS.items():
        data, others = json.dumps(records).encode(), train if kind == "zsre" else {}
        yield Reader(f"records: {kind}", "r.json", data, damaged_json, reads(kind), others)
    data = train["zsre_mend_train.json"]
    others = {"r.json": json.dumps(RECORDS["zsre"]).encode()}
    yield Reader("records: zsre", "zsre_mend_train.json", data, damaged_json, reads("zsre"), others)


# ---- the watch


class Hang(BaseException):
    """An input took too long."""


class Watch:
    """Sees what is executed, or written outside a directory, while a reader runs."""

    EXECUTES = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket")
    WRITES = ("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._inside: str | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        inside = self._inside
        if inside is None:
            return
        if event.startswith(self.EXECUTES) and event != "socket.gethostname":
            self.seen.append(event)
        paths: tuple[Any, ...] = ()
        is_open = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if is_open or event in self.WRITES:
            paths = arguments[:1]
        elif event in ("os.rename", "os.link", "os.symlink"):
            paths = arguments[:2]
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike) and not self._leads(
                os.fsdecode(path), is_open
            ).startswith(inside):
                self.seen.append(f"{event} {path!r}")

    def _leads(self, path: str, is_followed: bool) -> str:
        """Return where a path leads; what renames or removes a link does not follow it."""
        if is_followed:
            return os.path.realpath(path)
        return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))

    @contextmanager
    def over(self, directory: Path) -> Iterator[None]:
        """Watch, with a limit on time."""

        def alarm(*_: Any) -> None:
            raise Hang

        self.seen.clear()
        signals = (signal.SIGPROF, signal.SIGALRM)
        before = [signal.signal(number, alarm) for number in signals]
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        signal.setitimer(signal.ITIMER_REAL, WAIT_S)
        limits = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, limits[1]))
        self._inside = os.path.realpath(directory)
        try:
            yield
        finally:
            self._inside = None
            resource.setrlimit(resource.RLIMIT_AS, limits)
            for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
                signal.setitimer(timer, 0)
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)


def is_ours(error: BaseException) -> bool:
    """Tell whether a statement `raise` of our own code raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    file = trace.tb_frame.f_code.co_filename
    return file.startswith(PACKAGE) and linecache.getline(file, trace.tb_lineno).strip().startswith(
        "raise"
    )


def outcome(reader: Reader, path: Path, watch: Watch) -> tuple[str, str]:
    """Read an input; return what came of it, and what is wrong with that."""
    wrong = ""
    try:
        with watch.over(path):
            reader.read(path)
        result = "read"
    except Hang:
        result, wrong = "hang", f"more than {LIMIT_S} s of CPU time, or {WAIT_S} s of waiting"
    except Exception as error:  # noqa: BLE001
        result = type(error).__name__
        is_refusal = type(error) in (ValueError, TypeError) and is_ours(error)
        is_refusal = is_refusal or (isinstance(error, OSError) and str(error) != "")
        names_it = reader.name == "rehearsal memory" or any(
            name in str(error) for name in (reader.file, *reader.others, str(path))
        )
        if not is_refusal:
            wrong = f"{result}: {str(error)[:200]}"
        elif not names_it:
            wrong = f"{result} without the file's name: {str(error)[:200]}"
        elif len(str(error)) > MAX_MESSAGE:
            wrong = f"{result} with a message of {len(str(error))} characters"
    if watch.seen:
        wrong = f"{wrong} {'; '.join(watch.seen)}"
    return result, wrong


def run(inputs: int, seed: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Read so many inputs, the readers in turn.

    Returns:
        Outcomes by reader, and findings.
    """
    counts: dict[str, Counter[str]] = {}
    findings: list[str] = []
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        readers = [*kept_readers(root), *yaml_readers(), *record_readers()]
        by_name: dict[str, list[Reader]] = {}
        for reader in readers:
            by_name.setdefault(reader.name, []).append(reader)
        canary = root / "canary"
        for i in range(inputs):
            rng = random.Random(f"{seed}/{i}")
            group = by_name[list(by_name)[i % len(by_name)]]
            reader = rng.choice(group)
            path = root / "input"
            path.mkdir()
            for name, data in reader.others.items():
                (path / name).parent.mkdir(exist_ok=True)
                (path / name).write_bytes(data)
            damaged = reader.damage(reader.data, rng).replace(b"%s", bytes(canary))
            (path / reader.file).write_bytes(damaged)
            if rng.random() < 0.15 and reader.name != "rehearsal memory":  # that is no file
                what = put_special(path / rng.choice((reader.file, *reader.others)), rng)
                damaged = what.encode()
            result, wrong = outcome(reader, path, watch)
            if canary.exists():
                wrong = f"{wrong} executed"
                canary.unlink()
            counts.setdefault(reader.name, Counter())[result] += 1
            if wrong:
                short = base64.b85encode(damaged[:60]).decode()
                findings.append(f"{reader.name}, input {i}: {wrong} [{short}]")
            shutil.rmtree(path)
    return counts, findings


def main() -> int:
    """Read the options, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    counts, findings = run(arguments.inputs, arguments.seed)
    for name, outcomes in counts.items():
        print(f"{name}: {', '.join(f'{what} {n}' for what, n in outcomes.most_common())}")
    for finding in findings[:50]:
        print(f"FINDING {finding}")
    seconds = time.perf_counter() - start
    print(f"{arguments.inputs} inputs, {len(findings)} findings, {seconds:.0f} s")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
