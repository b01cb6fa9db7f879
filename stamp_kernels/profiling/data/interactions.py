"""Who interacted with what, in time order, from the files that the profile reads.

The package ships no data set: the caller names a file, or installs `recbole` for MovieLens-100K.
"""

import importlib.metadata
import zipfile
import zlib
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np

MIN_INTERACTIONS = 3  # leave-one-out takes one each for training, validation and test
HELD_OUT = 2  # of each user, for validation and test
MAX_ITEMS = 10**8  # the profile keeps tables of all items

MOVIELENS = "dataset_example/ml-100k/ml-100k.inter"


@dataclass(frozen=True, eq=False)
class Interactions:
    """Every user's items in time order.

    Attributes:
        name: short name of the data set.
        items: int64 `[total]`, item numbers in [0, num_items), each user's in time order.
        offsets: int64 `[num_users + 1]`; user `u` has `items[offsets[u]:offsets[u + 1]]`, at least 3 of them.
        num_items: the number of items, including those that nobody interacted with; at most 100 million.
        semantic_ids: int64 `[num_items, codes_per_item]`, codes of at least 0, or None.
        source: where the data came from and how much of it there is, in words.

    Raises:
        ValueError: another dtype or shape, or contents that break one of these rules.
    """

    name: str
    items: np.ndarray
    offsets: np.ndarray
    num_items: int
    semantic_ids: np.ndarray | None
    source: str

    def __post_init__(self) -> None:
        for field in ("items", "offsets"):
            array = getattr(self, field)
            if array.dtype != np.int64 or array.ndim != 1:
                raise ValueError(f"{self.name}: {field} must be int64 with 1 dimension, got {_describe(array)}")
        if self.semantic_ids is not None and self.semantic_ids.dtype != np.int64:
            raise ValueError(f"{self.name}: semantic_ids must be int64, got {_describe(self.semantic_ids)}")
        _check_sequences(self.name, self.items, self.offsets, self.num_items, self.semantic_ids)
        if self.num_users == 0:
            raise ValueError(f"{self.name}: found no users, expected at least one")
        shortest = np.diff(self.offsets).min()
        if shortest < MIN_INTERACTIONS:
            raise ValueError(
                f"{self.name}: found a user with {shortest} interactions, expected at least {MIN_INTERACTIONS}"
            )

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1


def load_interactions(path: str | Path | None) -> Interactions:
    """Read interaction sequences from a file.

    The suffix and the content decide which format it is:

    - `.npz`: `seq_items` `[total]`, `seq_offsets` `[num_users + 1]` and, if there are semantic IDs, `sids`
      `[num_items, codes_per_item]`, all of an integer dtype; items count from 0;
    - RecBole's atomic `.inter`: tab-separated columns, among them `user_id:token` and `item_id:token`. Rows are sorted
      by `timestamp`, a number that is compared with all its digits; equal ones stay in the file's order, and so do all
      rows of a file without that column. Items are numbered in the order of their tokens as text;
    - any other text: a line `user item item ...` of integers per user, items in time order. Items are numbered in the
      order of their ids.

    Users with fewer than 3 interactions are dropped; their items keep their numbers.

    Args:
        path: the file. None: MovieLens-100K from the installed `recbole` distribution, which is not imported.

    Raises:
        FileNotFoundError: there is no such file, or `path` is None and `recbole` is not installed.
        ValueError: the file cannot be read as one of the formats, or no user is left.
    """
    path = _find_movielens() if path is None else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: not a file, expected an .npz, .inter or text file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path.name}: the file is empty, expected interactions")

    if path.suffix == ".npz" or zipfile.is_zipfile(path):
        items, offsets, num_items, semantic_ids = _read_npz(path)
    else:
        semantic_ids = None
        lines = _read_lines(path)
        if path.suffix == ".inter" or ":token" in lines[0]:
            items, offsets, num_items = _read_inter(path.name, lines)
        else:
            items, offsets, num_items = _read_text(path.name, lines)

    lengths = np.diff(offsets)
    kept = lengths >= MIN_INTERACTIONS
    if not kept.any():
        raise ValueError(
            f"{path.name}: none of the {len(lengths)} users has {MIN_INTERACTIONS} interactions or more, "
            "expected at least one (training, validation and test need one each)"
        )
    items = items[np.repeat(kept, lengths)]
    offsets = offsets_of_lengths(lengths[kept])
    dropped = f" ({len(lengths) - kept.sum():,} users with fewer than 3 left out)" if not kept.all() else ""
    source = f"{path.name}: {kept.sum():,} users, {num_items:,} items, {len(items):,} interactions{dropped}"
    return Interactions(path.stem, items, offsets, num_items, semantic_ids, source)


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def offsets_of_lengths(lengths: np.ndarray) -> np.ndarray:
    """int64 `[n + 1]`, where each sequence starts, and the total."""
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


def _check_sequences(
    name: str, items: np.ndarray, offsets: np.ndarray, num_items: int, semantic_ids: np.ndarray | None
) -> None:
    if len(offsets) == 0 or offsets[0] != 0:
        first = offsets[0] if len(offsets) else "nothing"
        raise ValueError(f"{name}: offsets start with {first}, expected 0")
    if (np.diff(offsets) < 0).any():
        user = int(np.argmax(np.diff(offsets) < 0))
        raise ValueError(
            f"{name}: offsets decrease from {offsets[user]} to {offsets[user + 1]} at user {user}, "
            "expected offsets that never decrease"
        )
    if offsets[-1] != len(items):
        raise ValueError(f"{name}: offsets end with {offsets[-1]}, expected the number of interactions, {len(items)}")
    if len(items) and items.min() < 0:
        raise ValueError(f"{name}: found item {items.min()}, expected item numbers of at least 0")
    if num_items > MAX_ITEMS:
        raise ValueError(
            f"{name}: found {num_items} items, expected at most {MAX_ITEMS}: number the items from 0 without gaps"
        )
    if len(items) and items.max() >= num_items:
        raise ValueError(
            f"{name}: found item {items.max()}, expected item numbers below {num_items}, the number of items"
        )
    if semantic_ids is not None:
        if semantic_ids.ndim != 2 or len(semantic_ids) != num_items or semantic_ids.shape[1] == 0:
            raise ValueError(
                f"{name}: semantic IDs have shape {list(semantic_ids.shape)}, "
                f"expected [{num_items} items, codes_per_item]"
            )
        if semantic_ids.size and semantic_ids.min() < 0:
            raise ValueError(f"{name}: found semantic-ID code {semantic_ids.min()}, expected codes of at least 0")


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, int, np.ndarray | None]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path.name}: not a readable .npz archive, expected one with seq_items and seq_offsets")
    try:
        # np.load leaves a damaged file open if it opens it itself.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in ("seq_items", "seq_offsets", "sids") if key in archive.files}
            found = archive.files
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path.name}: not a readable .npz archive ({error}), expected one with seq_items and seq_offsets"
        ) from error

    for key, dimensions in (("seq_items", 1), ("seq_offsets", 1), ("sids", 2)):
        if key not in arrays:
            if key == "sids":
                continue
            raise ValueError(f"{path.name}: no array {key}, found {found}, expected seq_items and seq_offsets")
        array = np.asarray(arrays[key])
        if array.dtype.kind not in "iu" or array.ndim != dimensions:
            raise ValueError(
                f"{path.name}: {key} is {_describe(array)}, expected integers with {dimensions} dimension(s)"
            )
        if array.size and array.max() > 2**63 - 1:
            raise ValueError(f"{path.name}: {key} has the number {array.max()}, expected at most 2**63 - 1")
        arrays[key] = array.astype(np.int64)

    items, offsets, semantic_ids = arrays["seq_items"], arrays["seq_offsets"], arrays.get("sids")
    num_items = int(items.max(initial=-1)) + 1 if semantic_ids is None else len(semantic_ids)
    _check_sequences(path.name, items, offsets, num_items, semantic_ids)
    return items, offsets, num_items, semantic_ids


def _read_lines(path: Path) -> list[str]:
    try:
        # Not str.splitlines: it also splits at Unicode line separators, which a token may contain.
        return path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name}: not UTF-8 text ({error.reason} at byte {error.start}), expected text"
        ) from error


def _read_inter(name: str, lines: list[str]) -> tuple[np.ndarray, np.ndarray, int]:
    header = lines[0].split("\t")
    for column in ("user_id:token", "item_id:token"):
        if column not in header:
            raise ValueError(
                f"{name}: line 1: no column {column}, found {header}, "
                "expected tab-separated columns with user_id:token, item_id:token and, optionally, timestamp:float"
            )
    user_column, item_column = header.index("user_id:token"), header.index("item_id:token")
    time_column = next((i for i, column in enumerate(header) if column.split(":")[0] == "timestamp"), None)

    users: list[str] = []
    items: list[str] = []
    times: list[int | Decimal] = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != len(header):
            raise ValueError(f"{name}: line {number}: found {len(fields)} columns, expected the header's {len(header)}")
        if not fields[user_column] or not fields[item_column]:
            raise ValueError(f"{name}: line {number}: found an empty user or item, expected a token")
        users.append(fields[user_column])
        items.append(fields[item_column])
        if time_column is not None:
            time = _exact_number(fields[time_column])
            if time is None:
                raise ValueError(
                    f"{name}: line {number}: found the timestamp {fields[time_column]!r}, expected a finite number"
                )
            times.append(time)

    user_tokens, user_numbers = np.unique(users, return_inverse=True)
    item_tokens, item_numbers = np.unique(items, return_inverse=True)
    # Both sorts are stable: rows with equal keys stay in the file's order.
    if time_column is None:
        order = np.argsort(user_numbers, kind="stable")
    else:
        # Exact numbers by their ranks: NumPy's floats do not tell one nanosecond from the next.
        rank_of = {time: rank for rank, time in enumerate(sorted(set(times)))}
        order = np.lexsort((np.array([rank_of[time] for time in times], dtype=np.int64), user_numbers))
    offsets = offsets_of_lengths(np.bincount(user_numbers, minlength=len(user_tokens)))
    return item_numbers[order].astype(np.int64), offsets, len(item_tokens)


def _exact_number(text: str) -> int | Decimal | None:
    """The number that a text stands for, with all its digits; None if it is not a finite number."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _read_text(name: str, lines: list[str]) -> tuple[np.ndarray, np.ndarray, int]:
    rows: list[np.ndarray] = []
    line_of_user: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = np.array(line.split(), dtype=np.int64)
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"{name}: line {number}: found {line[:60]!r}, expected integers: user item item ..."
            ) from error
        if (row[1:] < 0).any():
            raise ValueError(f"{name}: line {number}: found item {row[1:].min()}, expected items of at least 0")
        user = int(row[0])
        if user in line_of_user:
            raise ValueError(
                f"{name}: line {number}: found user {user} again (first on line {line_of_user[user]}), "
                "expected one line per user"
            )
        line_of_user[user] = number
        rows.append(row[1:])

    ids, items = np.unique(np.concatenate([np.empty(0, np.int64), *rows]), return_inverse=True)
    return items.astype(np.int64), offsets_of_lengths(np.array([len(row) for row in rows], dtype=np.int64)), len(ids)


def _find_movielens() -> Path:
    try:
        files = importlib.metadata.files("recbole") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(file.locate())
        if file.as_posix().endswith(MOVIELENS) and path.is_file():
            return path
    raise FileNotFoundError(
        f"MovieLens-100K was not found: the installed recbole distribution contains it ({MOVIELENS}). "
        "Run `pip install --no-deps recbole`, or name a file of interactions"
    )


def in_training_part(interactions: Interactions) -> np.ndarray:
    """bool `[total]`: False for the last two interactions of every user."""
    mask = np.ones(len(interactions.items), dtype=bool)
    for held_out in range(1, HELD_OUT + 1):
        mask[interactions.offsets[1:] - held_out] = False
    return mask
