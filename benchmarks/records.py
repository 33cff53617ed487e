"""The finished runs of a benchmark that trains: kept in a file, and not repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import common

Key = tuple[str, str, float, int, int]


@dataclass(frozen=True)
class Finished:
    """One finished run; a benchmark adds what it measured."""

    variant: str
    options: str  # of FalqonConfig, defaults included
    learning_rate: float
    seed: int
    steps: int

    @property
    def key(self) -> Key:
        return self.variant, self.options, self.learning_rate, self.seed, self.steps


R = TypeVar("R", bound=Finished)


class Results(Generic[R]):
    """The records of a file, written after each run.

    Args:
        file: JSON; a table in CSV is written beside it.
        kind: of the records.
        protocol: what all runs of the file have in common.
        not_in_csv: fields of a record that are left out there.
    """

    def __init__(
        self,
        file: Path,
        kind: type[R],
        protocol: Mapping[str, Any],
        not_in_csv: Sequence[str] = (),
    ) -> None:
        self.file, self.not_in_csv = file, not_in_csv
        self.head = {"protocol": dict(protocol)}
        content: Any = common.read_json(file) if file.exists() else {**self.head, "records": []}
        if content.get("protocol") != protocol:
            raise SystemExit(f"{file} was measured with another protocol: name another --results")
        self.records = [kind(**record) for record in content["records"]]

    def find(self, key: Key) -> R | None:
        return next((record for record in self.records if record.key == key), None)

    def add(self, record: R) -> None:
        self.records.append(record)
        rows = [asdict(record) for record in self.records]
        content = {"environment": common.environment(), **self.head, "records": rows}
        common.write_json(self.file, content)
        for row in rows:
            for name in self.not_in_csv:
                del row[name]
        common.write_csv(self.file.with_suffix(".csv"), rows)
