"""The results file of a check: JSON lines, each written as soon as it is known. Without third-party imports.

Records name their `part`. Those with a `status` are about a case of the part (or the whole part, without `case`):
"begun", then "ok", "failed" or "skipped". The others are measurements.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
KEYS_OF_ALL = ("part", "status", "case")


class Results:
    """What one part appends to the results file."""

    def __init__(self, file: Path, part: str) -> None:
        self.file = file
        self.part = part

    def add(self, **record: Any) -> None:
        with open(self.file, "a") as file:  # closed, and so flushed, at once
            file.write(json.dumps({"part": self.part, **record}) + "\n")

    def begun(self) -> set[str]:
        """The cases that this part has begun, in this process or before it."""
        records = read_records(self.file)
        return {record["case"] for record in records if record["part"] == self.part and record["status"] == "begun"}


def read_records(file: Path) -> list[Record]:
    """Every whole line; the last one may have been cut off. Missing statuses read as None."""
    return list(_whole_lines(file)) if file.exists() else []


def _whole_lines(file: Path) -> Iterator[Record]:
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        yield {**dict.fromkeys(KEYS_OF_ALL), **record}
