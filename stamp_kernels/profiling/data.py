"""Real interaction sequences to batches of semantic-ID tokens.

The path is the one that TIGER-style trainers take: interactions (`load_interactions`), semantic IDs
(`assign_semantic_ids`, where the file has none), leave-one-out rows (`TrainingRows`, `EvaluationRows`), tokens
(`Vocabulary`) and batches, padded and packed side by side (`collate`, `batches`), so that every model compared reads
the same tokens. No data set is shipped with the package: the caller names a file, or installs `recbole` for
MovieLens-100K.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

__all__ = [
    "Batch",
    "EvaluationRows",
    "Interactions",
    "TrainingRows",
    "Vocabulary",
    "assign_semantic_ids",
    "batches",
    "collate",
    "load_interactions",
]

IGNORE_INDEX = -100
MINIMUM_INTERACTIONS = 3  # leave-one-out takes one each for training, validation and test
HELD_OUT = 2

MOVIELENS = "dataset_example/ml-100k/ml-100k.inter"

SVD_DIMENSIONS = 64
# Part of the cache key: raise it when `_residual_kmeans` or `_disambiguate` gives other codes for the same input.
SEMANTIC_ID_VERSION = 1


@dataclass(frozen=True, eq=False)
class Interactions:
    """Every user's items in time order.

    Attributes:
        name: short name of the data set.
        items: int64 [total], item numbers in [0, num_items), each user's in time order.
        offsets: int64 [num_users + 1]; user `u` has `items[offsets[u]:offsets[u + 1]]`, at least 3 of them.
        num_items: number of items, those that nobody interacted with included.
        semantic_ids: int64 [num_items, levels], codes of at least 0, or None.
        source: where the data came from and how much of it there is, in words.

    Raises:
        ValueError: for other dtypes or shapes, and contents that break one of these rules.
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
                raise ValueError(f"{self.name}: {field} is {_describe(array)}, expected int64 with 1 dimension")
        if self.semantic_ids is not None and self.semantic_ids.dtype != np.int64:
            raise ValueError(f"{self.name}: semantic_ids is {_describe(self.semantic_ids)}, expected int64")
        _check_sequences(self.name, self.items, self.offsets, self.num_items, self.semantic_ids)
        if self.num_users == 0:
            raise ValueError(f"{self.name}: found no users, expected at least one")
        shortest = np.diff(self.offsets).min()
        if shortest < MINIMUM_INTERACTIONS:
            raise ValueError(
                f"{self.name}: a user has {shortest} interactions, expected at least {MINIMUM_INTERACTIONS}"
            )

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1


def load_interactions(path: str | Path | None) -> Interactions:
    """Reads interaction sequences from a file.

    Formats, told apart by suffix and content:

    - `.npz`: `seq_items` [total], `seq_offsets` [num_users + 1] and, where there are semantic IDs, `sids`
      [num_items, levels], all of an integer dtype; items are 0-based;
    - RecBole's atomic `.inter`: tab-separated columns, among them `user_id:token` and `item_id:token`. Rows are ordered
      by `timestamp` (equal ones as in the file), without that column as in the file. Items are numbered in the order of
      their tokens as text;
    - any other text: a line `user item item ...` of integers per user, items in time order. Items are numbered in the
      order of their ids.

    Users with fewer than 3 interactions are dropped, their items keep their numbers.

    Args:
        path: the file; None takes MovieLens-100K from the installed `recbole` distribution, which is not imported.

    Raises:
        FileNotFoundError: if there is no such file, or `path` is None and `recbole` is not installed.
        ValueError: if the file cannot be read as one of the formats, or no user is left.
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
    kept = lengths >= MINIMUM_INTERACTIONS
    if not kept.any():
        raise ValueError(
            f"{path.name}: none of the {len(lengths)} users has {MINIMUM_INTERACTIONS} interactions or more, "
            "expected at least one (training, validation and test take one each)"
        )
    items = items[np.repeat(kept, lengths)]
    offsets = _offsets(lengths[kept])
    dropped = f" ({len(lengths) - kept.sum():,} users with fewer than 3 left out)" if not kept.all() else ""
    source = f"{path.name}: {kept.sum():,} users, {num_items:,} items, {len(items):,} interactions{dropped}"
    return Interactions(path.stem, items, offsets, num_items, semantic_ids, source)


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _offsets(lengths: np.ndarray) -> np.ndarray:
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
            "expected them never to decrease"
        )
    if offsets[-1] != len(items):
        raise ValueError(f"{name}: offsets end with {offsets[-1]}, expected the number of interactions, {len(items)}")
    if len(items) and items.min() < 0:
        raise ValueError(f"{name}: found item {items.min()}, expected item numbers of at least 0")
    if len(items) and items.max() >= num_items:
        raise ValueError(
            f"{name}: found item {items.max()}, expected item numbers below {num_items}, the number of items"
        )
    if semantic_ids is not None:
        if semantic_ids.ndim != 2 or len(semantic_ids) != num_items or semantic_ids.shape[1] == 0:
            raise ValueError(
                f"{name}: semantic IDs have shape {list(semantic_ids.shape)}, expected [{num_items} items, levels]"
            )
        if semantic_ids.size and semantic_ids.min() < 0:
            raise ValueError(f"{name}: found semantic-ID code {semantic_ids.min()}, expected codes of at least 0")


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, int, np.ndarray | None]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path.name}: not a readable .npz archive, expected one with seq_items and seq_offsets")
    try:
        with np.load(path, allow_pickle=False) as archive:
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
        arrays[key] = array.astype(np.int64)

    items, offsets, semantic_ids = arrays["seq_items"], arrays["seq_offsets"], arrays.get("sids")
    num_items = int(items.max(initial=-1)) + 1 if semantic_ids is None else len(semantic_ids)
    _check_sequences(path.name, items, offsets, num_items, semantic_ids)
    return items, offsets, num_items, semantic_ids


def _read_lines(path: Path) -> list[str]:
    try:
        # Not str.splitlines: a token may hold one of the Unicode line separators that it splits at.
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
    times: list[float] = []
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
            try:
                time = float(fields[time_column])
            except ValueError:
                time = np.nan
            if not np.isfinite(time):
                raise ValueError(
                    f"{name}: line {number}: found the timestamp {fields[time_column]!r}, expected a finite number"
                )
            times.append(time)

    user_tokens, user_numbers = np.unique(users, return_inverse=True)
    item_tokens, item_numbers = np.unique(items, return_inverse=True)
    # Both sorts are stable: what the keys leave open stays as in the file.
    order = np.argsort(user_numbers, kind="stable") if time_column is None else np.lexsort((times, user_numbers))
    offsets = _offsets(np.bincount(user_numbers, minlength=len(user_tokens)))
    return item_numbers[order].astype(np.int64), offsets, len(item_tokens)


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
    return items.astype(np.int64), _offsets(np.array([len(row) for row in rows], dtype=np.int64)), len(ids)


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
        f"MovieLens-100K was not found: it is read from the installed recbole distribution ({MOVIELENS}). "
        "Run `pip install --no-deps recbole`, or name a file of interactions"
    )


def assign_semantic_ids(
    interactions: Interactions,
    *,
    levels: int = 4,
    codebook_size: int = 256,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> np.ndarray:
    """Makes unique semantic IDs from the training interactions.

    The item x user counts of the training part (every sequence without its last two items) go through a truncated SVD,
    rows are L2-normalised and coded by residual k-means over `levels - 1` levels. The last level tells items with equal
    codes apart (0, 1, 2, ... in order of item number), as in TIGER. Where more than `codebook_size` items share a
    prefix, as items that do not occur in the training part may, the others move on to the lexicographically next prefix
    that has codes left (after the last prefix comes the first).

    The same arguments give the same IDs, whatever the number of threads. They are kept in
    `<cache_dir>/semantic_ids_<hash of the training interactions and the arguments>.npz`; a damaged file is made again,
    a directory that cannot be written gives a RuntimeWarning.

    Args:
        interactions: the sequences; their own `semantic_ids` are not read.
        levels: codes per item, at least 1.
        codebook_size: codes per level, at least 1.
        seed: seed of the SVD and of k-means.
        cache_dir: None is `stamp_kernels` in `$XDG_CACHE_HOME`, or in `~/.cache`.

    Returns:
        int64 [num_items, levels], codes in [0, codebook_size), rows unique.

    Raises:
        ValueError: if `levels` or `codebook_size` is below 1, or there are more items than IDs.
        ImportError: if scikit-learn is missing and the IDs are not in the cache.
    """
    _check_at_least("levels", levels, 1)
    _check_at_least("codebook_size", codebook_size, 1)
    if interactions.num_items > codebook_size**levels:
        raise ValueError(
            f"levels={levels} and codebook_size={codebook_size} give {codebook_size**levels} semantic IDs, "
            f"expected at least {interactions.num_items}, the number of items"
        )
    users = np.repeat(np.arange(interactions.num_users), np.diff(interactions.offsets) - HELD_OUT)
    items = interactions.items[_in_training_part(interactions)]

    key = hashlib.sha256(repr((SEMANTIC_ID_VERSION, interactions.num_items, levels, codebook_size, seed)).encode())
    key.update(users.tobytes())
    key.update(items.tobytes())
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stamp_kernels"
    path = Path(cache_dir) / f"semantic_ids_{key.hexdigest()[:32]}.npz"

    semantic_ids = _read_cache(path, (interactions.num_items, levels), codebook_size)
    if semantic_ids is None:
        codes = _residual_kmeans(
            users, items, (interactions.num_items, interactions.num_users), levels - 1, codebook_size, seed
        )
        semantic_ids = _disambiguate(codes, codebook_size)
        _write_cache(path, semantic_ids)
    return semantic_ids


def _check_at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"{name} is {value}, expected at least {minimum}")


def _in_training_part(interactions: Interactions) -> np.ndarray:
    """bool [total]: whether an interaction is none of its user's last two."""
    mask = np.ones(len(interactions.items), dtype=bool)
    for held_out in range(1, HELD_OUT + 1):
        mask[interactions.offsets[1:] - held_out] = False
    return mask


def _residual_kmeans(
    users: np.ndarray, items: np.ndarray, shape: tuple[int, int], levels: int, codebook_size: int, seed: int
) -> np.ndarray:
    """int64 [num_items, levels]: codes of the items' vectors, `shape` being [num_items, num_users]."""
    codes = np.zeros((shape[0], levels), dtype=np.int64)
    if levels == 0:
        return codes
    try:  # only here: whoever brings semantic IDs along needs no scikit-learn
        from scipy.sparse import csr_matrix
        from sklearn.cluster import KMeans
        from sklearn.decomposition import TruncatedSVD
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError("making semantic IDs takes scikit-learn: run `pip install scikit-learn`") from error

    counts = csr_matrix((np.ones(len(items)), (items, users)), shape=shape)
    # One thread: the last bits of parallel sums, and so a code now and then, would depend on the number of threads.
    with threadpool_limits(limits=1), warnings.catch_warnings(), np.errstate(invalid="ignore"):
        # Fewer clusters than asked for are fine, the last level tells their items apart; errstate is for the explained
        # variance, which is not used, of a single item.
        warnings.simplefilter("ignore", ConvergenceWarning)
        svd = TruncatedSVD(min(SVD_DIMENSIONS, *shape), random_state=seed).fit(counts)
        # transform, not fit_transform: a product row by row, so equal rows stay equal and rows of zeros stay zeros.
        vectors = svd.transform(counts)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        # What is left of an item outside the subspace is rounding noise: it counts as zero, like a row of zeros.
        residual = np.where(norms > 1e-6, vectors / np.maximum(norms, 1e-6), 0.0)
        for level in range(levels):
            residual = np.round(residual, 6)  # rows that differ by rounding noise alone are one point
            clusters = min(codebook_size, len(np.unique(residual, axis=0)))
            kmeans = KMeans(clusters, n_init=1, random_state=seed).fit(residual)
            codes[:, level] = kmeans.labels_
            residual = residual - kmeans.cluster_centers_[kmeans.labels_]
    return codes


def _disambiguate(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """int64 [num_items, levels]: `codes` [num_items, levels - 1] and the level that makes the rows unique."""
    num_items, levels = codes.shape[0], codes.shape[1] + 1
    num_prefixes = codebook_size ** (levels - 1)
    # A prefix as one number, in Python's integers: codebook_size ** levels may pass 2**63.
    prefixes = [0] * num_items
    for level_codes in codes.T.tolist():
        prefixes = [prefix * codebook_size + code for prefix, code in zip(prefixes, level_codes, strict=True)]

    semantic_ids = np.concatenate((codes, np.zeros((num_items, 1), dtype=np.int64)), axis=1)
    used: dict[int, int] = {}
    overflow: list[int] = []
    for item, prefix in enumerate(prefixes):
        code = used.get(prefix, 0)
        if code == codebook_size:
            overflow.append(item)
            continue
        semantic_ids[item, -1] = code
        used[prefix] = code + 1

    search_from: dict[int, int] = {}  # prefixes never get room again, so a search goes on where the last one ended
    for item in overflow:
        prefix = search_from.get(prefixes[item], prefixes[item])
        while used.get(prefix, 0) == codebook_size:
            prefix = (prefix + 1) % num_prefixes
        search_from[prefixes[item]] = prefix
        semantic_ids[item, -1] = used.get(prefix, 0)
        used[prefix] = used.get(prefix, 0) + 1
        for level in range(levels - 2, -1, -1):
            prefix, semantic_ids[item, level] = divmod(prefix, codebook_size)
    return semantic_ids


def _read_cache(path: Path, shape: tuple[int, int], codebook_size: int) -> np.ndarray | None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            semantic_ids = archive["semantic_ids"]
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    if semantic_ids.shape != shape or semantic_ids.dtype != np.int64:
        return None
    return semantic_ids if semantic_ids.min() >= 0 and semantic_ids.max() < codebook_size else None


def _write_cache(path: Path, semantic_ids: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with open(descriptor, "wb") as file:
                np.savez_compressed(file, semantic_ids=semantic_ids)
            os.replace(temporary, path)  # a reader sees the whole file or none
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        warnings.warn(
            f"the semantic IDs were not kept, {path} cannot be written: {error}", RuntimeWarning, stacklevel=3
        )


class _Rows:
    """Examples as three positions each in `items`, see `TrainingRows`."""

    def __init__(self, items: np.ndarray, start: np.ndarray, target: np.ndarray, end: np.ndarray) -> None:
        self.items = items
        self.start = start
        self.target = target
        self.end = end

    def __len__(self) -> int:
        return len(self.target)


class TrainingRows(_Rows):
    """Every next-item example of the training parts: each user's items without the last two.

    Item `t >= 1` of a training part is the target of one row, the up to `max_items` items before it are the history,
    those after it within the training part the auxiliary targets. Rows are in order of user, then `t`.

    Attributes:
        items: int64 [total], those of `interactions`.
        start, target, end: int64 [rows], positions in `items`: the history is `items[start:target]`, the target
            `items[target]`, the items after it `items[target + 1:end]`.

    Raises:
        ValueError: if `max_items` is below 1.
    """

    def __init__(self, interactions: Interactions, max_items: int = 30) -> None:
        _check_at_least("max_items", max_items, 1)
        has_history = _in_training_part(interactions)
        has_history[interactions.offsets[:-1]] = False
        target = np.flatnonzero(has_history)
        user = np.searchsorted(interactions.offsets, target, side="right") - 1
        start = np.maximum(interactions.offsets[user], target - max_items)
        super().__init__(interactions.items, start, target, interactions.offsets[user + 1] - HELD_OUT)


class EvaluationRows(_Rows):
    """One row per user: predict the last but one item ("validation") or the last one ("test").

    The history is the up to `max_items` items before the target, for the test the validation target among them. There
    are no auxiliary targets.

    Attributes:
        items, start, target, end: as in `TrainingRows`, with `end = target + 1`.

    Raises:
        ValueError: if `max_items` is below 1, or for another split.
    """

    def __init__(self, interactions: Interactions, split: Literal["validation", "test"], max_items: int = 30) -> None:
        _check_at_least("max_items", max_items, 1)
        if split not in ("validation", "test"):
            raise ValueError(f"split is {split!r}, expected 'validation' or 'test'")
        target = interactions.offsets[1:] - (2 if split == "validation" else 1)
        start = np.maximum(interactions.offsets[:-1], target - max_items)
        super().__init__(interactions.items, start, target, target + 1)


@dataclass(frozen=True)
class Vocabulary:
    """Token ids of semantic-ID codes: `1 + level * codebook_size + code`; 0 is padding and the decoder's start.

    Raises:
        ValueError: if `levels` or `codebook_size` is below 1.
    """

    levels: int
    codebook_size: int
    pad_id: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check_at_least("levels", self.levels, 1)
        _check_at_least("codebook_size", self.codebook_size, 1)

    @property
    def size(self) -> int:
        return 1 + self.levels * self.codebook_size

    def level_range(self, level: int) -> tuple[int, int]:
        """The half-open range of the token ids of a level, counted from 0.

        Raises:
            ValueError: if there is no such level.
        """
        if not 0 <= level < self.levels:
            raise ValueError(f"level is {level}, expected 0 to {self.levels - 1}")
        start = 1 + level * self.codebook_size
        return start, start + self.codebook_size

    def tokens(self, codes: np.ndarray) -> np.ndarray:
        """Token ids, int64 [..., levels], of integer codes [..., levels].

        Raises:
            ValueError: if the last dimension is not `levels`, or a code lies outside [0, codebook_size).
        """
        if codes.ndim == 0 or codes.shape[-1] != self.levels:
            raise ValueError(f"codes have shape {list(codes.shape)}, expected the last dimension to be {self.levels}")
        if codes.size and not (codes.min() >= 0 and codes.max() < self.codebook_size):
            raise ValueError(
                f"codes lie in [{codes.min()}, {codes.max()}], expected them in [0, {self.codebook_size - 1}]"
            )
        return codes.astype(np.int64) + (1 + np.arange(self.levels) * self.codebook_size)


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch, padded and packed; S is the longest history of the batch in tokens, T the sum of all.

    Attributes:
        input_ids: int64 [B, S], histories as tokens, padded with 0 on the right.
        attention_mask: int64 [B, S], 1 for tokens and 0 for padding.
        packed_ids: int64 [T], the same tokens without padding.
        cu_seqlens: int32 [B + 1], where each history starts in `packed_ids`, and T.
        lengths: int64 [B], tokens per history, always on the host.
        max_seqlen: S.
        labels: int64 [B, levels], the target's tokens.
        future_labels: int64 [B, steps, levels], the tokens of the items after the target, -100 where there is none.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    packed_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: torch.Tensor
    max_seqlen: int
    labels: torch.Tensor
    future_labels: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`, with `lengths` left on the host."""
        moved = ("input_ids", "attention_mask", "packed_ids", "cu_seqlens", "labels", "future_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})


def collate(
    rows: TrainingRows | EvaluationRows,
    indices: np.ndarray,
    vocabulary: Vocabulary,
    semantic_ids: np.ndarray,
    auxiliary_steps: int,
) -> Batch:
    """Makes a batch of some rows.

    Args:
        rows: the examples.
        indices: integers [B], which of them.
        vocabulary: gives codes their token ids.
        semantic_ids: integers [num_items, levels].
        auxiliary_steps: items after the target in `future_labels`, 0 or more.

    Raises:
        ValueError: if `auxiliary_steps` is negative, or `semantic_ids` does not fit `vocabulary`.
        IndexError: if there is no such row, or no such item in `semantic_ids`.
    """
    _check_at_least("auxiliary_steps", auxiliary_steps, 0)
    start, target, end = rows.start[indices], rows.target[indices], rows.end[indices]

    num_history = target - start
    item_offsets = _offsets(num_history)
    # Position within the packed histories, shifted per row to the position in rows.items.
    history = np.arange(item_offsets[-1]) + np.repeat(start - item_offsets[:-1], num_history)
    packed_ids = vocabulary.tokens(semantic_ids[rows.items[history]]).reshape(-1)

    lengths = num_history * vocabulary.levels
    max_seqlen = int(lengths.max(initial=0))
    mask = np.arange(max_seqlen) < lengths[:, None]
    input_ids = np.full(mask.shape, vocabulary.pad_id, dtype=np.int64)
    input_ids[mask] = packed_ids

    future = target[:, None] + np.arange(1, auxiliary_steps + 1)
    exists = future < end[:, None]
    # Positions past the end read the target instead, which is always there, and are overwritten.
    future_labels = vocabulary.tokens(semantic_ids[rows.items[np.where(exists, future, target[:, None])]])
    future_labels[~exists] = IGNORE_INDEX

    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        packed_ids=torch.from_numpy(packed_ids),
        cu_seqlens=torch.from_numpy((item_offsets * vocabulary.levels).astype(np.int32)),
        lengths=torch.from_numpy(lengths),
        max_seqlen=max_seqlen,
        labels=torch.from_numpy(vocabulary.tokens(semantic_ids[rows.items[target]])),
        future_labels=torch.from_numpy(future_labels),
    )


def batches(
    rows: TrainingRows | EvaluationRows,
    batch_size: int,
    seed: int,
    vocabulary: Vocabulary,
    semantic_ids: np.ndarray,
    auxiliary_steps: int,
    *,
    epoch: int = 0,
) -> Iterator[Batch]:
    """One epoch of batches in an order drawn from `seed` and `epoch`; the last, incomplete batch is dropped.

    Args:
        batch_size: rows per batch, at most `len(rows)`.
        seed, epoch: integers of at least 0; the same pair gives the same batches.
        rows, vocabulary, semantic_ids, auxiliary_steps: as in `collate`, which also says what is raised.

    Raises:
        ValueError: at once, if `batch_size` is below 1 or above `len(rows)`, or `seed` or `epoch` is negative.
    """
    if not 1 <= batch_size <= len(rows):
        raise ValueError(f"batch_size is {batch_size}, expected 1 to {len(rows)}, the number of rows")
    _check_at_least("seed", seed, 0)
    _check_at_least("epoch", epoch, 0)
    order = np.random.default_rng((seed, epoch)).permutation(len(rows))
    firsts = range(0, len(rows) - batch_size + 1, batch_size)
    return (
        collate(rows, order[first : first + batch_size], vocabulary, semantic_ids, auxiliary_steps) for first in firsts
    )
