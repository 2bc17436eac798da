"""What a benchmark does: its protocols, cut into chunks that are edited, scored and restored."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from baft_easyedit.bench.config import BenchConfig, MethodConfig


@dataclass(frozen=True)
class Protocol:
    """T edit calls of `batch_size` requests in a row, then the scores of them all."""

    T: int = 1
    batch_size: int = 1

    @property
    def name(self) -> str:
        """`single`, `continual` or `batched`."""
        if self.batch_size > 1:
            return "batched"
        return "single" if self.T == 1 else "continual"

    @property
    def slug(self) -> str:
        """The name with its numbers, for files."""
        return {
            "single": "single",
            "continual": f"continual-T{self.T}",
            "batched": f"batched-B{self.batch_size}-T{self.T}",
        }[self.name]

    def chunks(self, num_records: int) -> list[range]:
        """Cut records into chunks of T times `batch_size`; the last may be shorter."""
        length = self.T * self.batch_size
        return [
            range(start, min(start + length, num_records))
            for start in range(0, num_records, length)
        ]


@dataclass(frozen=True)
class Unit:
    """What is done between two restores: one chunk under one method."""

    method: str
    """Name of the row."""
    protocol: Protocol
    chunk: int
    indices: range
    """Records, as indices into the run's requests."""

    @property
    def key(self) -> tuple[str, int, int, int]:
        """What tells units apart."""
        return self.method, self.protocol.T, self.protocol.batch_size, self.chunk


def protocols(config: BenchConfig) -> list[Protocol]:
    """Return a benchmark's protocols."""
    return [Protocol(T, size) for size in config.batch_size for T in config.T]


def units_of(
    methods: Sequence[MethodConfig], protocols: Sequence[Protocol], num_records: int
) -> list[Unit]:
    """Return all that is to be done, in the order of the configuration."""
    return [
        Unit(method.name, protocol, number, indices)
        for method in methods
        for protocol in protocols
        for number, indices in enumerate(protocol.chunks(num_records))
    ]


def file_name(text: str) -> str:
    """Return a row's name as a file name; different names stay different."""
    return re.sub(r"[^A-Za-z0-9.+-]", lambda match: f"_{ord(match[0]):x}", text)
