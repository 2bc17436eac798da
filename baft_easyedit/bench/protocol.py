"""Protocols, and the chunks of records that are edited, scored together and restored."""

from dataclasses import dataclass


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
        size = f"-B{self.batch_size}" if self.name == "batched" else ""
        return self.name if self.name == "single" else f"{self.name}{size}-T{self.T}"

    @property
    def length(self) -> int:
        """Records of a chunk."""
        return self.T * self.batch_size


@dataclass(frozen=True)
class Chunk:
    """What one method edits between two restores."""

    method: str  # name of the row
    protocol: Protocol
    number: int
    indices: range  # records, as indices into the run's requests


def chunks_of(method: str, protocol: Protocol, num_records: int) -> list[Chunk]:
    """Cut a row's records into chunks; the last may be shorter."""
    starts = range(0, num_records, protocol.length)
    return [
        Chunk(method, protocol, number, range(start, min(start + protocol.length, num_records)))
        for number, start in enumerate(starts)
    ]
