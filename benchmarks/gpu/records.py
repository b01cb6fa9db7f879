"""The results file of a check: JSON lines, each written immediately. This file has no third-party imports.

Every record names its `part`. A record with a `status` is about one case of the part, or about the whole part if it has
no `case`. The status is "begun", then "ok", "failed" or "skipped". All other records are measurements.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
KEYS_OF_ALL = ("part", "status", "case")


class Results:
    """Appends the records of one part to the results file."""

    def __init__(self, file: Path, part: str) -> None:
        self.file = file
        self.part = part

    def add(self, **record: Any) -> None:
        with open(self.file, "a") as file:  # closing flushes it
            file.write(json.dumps({"part": self.part, **record}) + "\n")

    def begun(self) -> set[str]:
        """The cases that this part has begun, in this process or an earlier one."""
        records = read_records(self.file)
        return {record["case"] for record in records if record["part"] == self.part and record["status"] == "begun"}


def read_records(file: Path) -> list[Record]:
    """The complete lines: the last one may be truncated. Missing keys of KEYS_OF_ALL are None."""
    return list(_whole_lines(file)) if file.exists() else []


def _whole_lines(file: Path) -> Iterator[Record]:
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        yield {**dict.fromkeys(KEYS_OF_ALL), **record}
