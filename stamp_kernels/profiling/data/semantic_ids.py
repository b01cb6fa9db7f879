"""Semantic IDs for items that have none, from who interacted with them."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

from stamp_kernels.profiling._checks import check_at_least
from stamp_kernels.profiling.data.interactions import HELD_OUT, Interactions, in_training_part

__all__ = ["assign_semantic_ids"]

SVD_DIMENSIONS = 64
# Part of the cache key: raise it when `_residual_kmeans` or `_disambiguate` gives other codes for the same input.
SEMANTIC_ID_VERSION = 1


def assign_semantic_ids(
    interactions: Interactions,
    *,
    codes_per_item: int = 4,
    codebook_size: int = 256,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> np.ndarray:
    """Makes unique semantic IDs from the training interactions.

    The item x user counts of the training part (every sequence without its last two items) go through a truncated SVD,
    rows are L2-normalised and coded by residual k-means over `codes_per_item - 1` levels. The last level tells items with
    equal codes apart (0, 1, 2, ... in order of item number), as in TIGER. Where more than `codebook_size` items share a
    prefix, as items that do not occur in the training part may, the others move on to the lexicographically next prefix
    that has codes left (after the last prefix comes the first).

    The same arguments give the same IDs, whatever the number of threads. They are kept in
    `<cache_dir>/semantic_ids_<hash of the training interactions and the arguments>.npz`; a damaged file is made again,
    a directory that cannot be written gives a RuntimeWarning.

    Args:
        interactions: the sequences; their own `semantic_ids` are not read.
        codes_per_item: codes per item, at least 1.
        codebook_size: codes per level, at least 1.
        seed: seed of the SVD and of k-means.
        cache_dir: None is `stamp_kernels` in `$XDG_CACHE_HOME`, or in `~/.cache`.

    Returns:
        int64 [num_items, codes_per_item], codes in [0, codebook_size), rows unique.

    Raises:
        ValueError: if `codes_per_item` or `codebook_size` is below 1, or there are more items than IDs.
        ImportError: if scikit-learn is missing and the IDs are not in the cache.
    """
    check_at_least("codes_per_item", codes_per_item, 1)
    check_at_least("codebook_size", codebook_size, 1)
    if interactions.num_items > codebook_size**codes_per_item:
        raise ValueError(
            f"codes_per_item={codes_per_item} and codebook_size={codebook_size} give "
            f"{codebook_size**codes_per_item} semantic IDs, "
            f"expected at least {interactions.num_items}, the number of items"
        )
    users = np.repeat(np.arange(interactions.num_users), np.diff(interactions.offsets) - HELD_OUT)
    items = interactions.items[in_training_part(interactions)]

    key = hashlib.sha256(
        repr((SEMANTIC_ID_VERSION, interactions.num_items, codes_per_item, codebook_size, seed)).encode()
    )
    key.update(users.tobytes())
    key.update(items.tobytes())
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stamp_kernels"
    path = Path(cache_dir) / f"semantic_ids_{key.hexdigest()[:32]}.npz"

    semantic_ids = _read_cache(path, (interactions.num_items, codes_per_item), codebook_size)
    if semantic_ids is None:
        # A second, empty column for a single user: TruncatedSVD takes no fewer.
        shape = (interactions.num_items, max(2, interactions.num_users))
        codes = _residual_kmeans(users, items, shape, codes_per_item - 1, codebook_size, seed)
        semantic_ids = _disambiguate(codes, codebook_size)
        _write_cache(path, semantic_ids)
    return semantic_ids


def _residual_kmeans(
    users: np.ndarray, items: np.ndarray, shape: tuple[int, int], codes_per_item: int, codebook_size: int, seed: int
) -> np.ndarray:
    """int64 [num_items, codes_per_item]: codes of the items' vectors, rows of an item x user matrix of this `shape`."""
    codes = np.zeros((shape[0], codes_per_item), dtype=np.int64)
    if codes_per_item == 0:
        return codes
    try:  # only here: whoever brings semantic IDs along needs no scikit-learn
        from scipy.sparse import csr_matrix
        from sklearn.cluster import KMeans
        from sklearn.decomposition import TruncatedSVD
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError("making semantic IDs takes scikit-learn: run `pip install scikit-learn`") from error

    counts = csr_matrix((np.ones(len(items)), (items, users)), shape=shape)
    # One thread: the last bits of parallel sums, and so a code now and then, would depend on the number of threads.
    # errstate: the explained variance, which is not used, divides by zero where all rows are equal.
    with threadpool_limits(limits=1), np.errstate(divide="ignore", invalid="ignore"):
        vectors = TruncatedSVD(min(SVD_DIMENSIONS, *shape), random_state=seed).fit_transform(counts)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        # The floor keeps what rounding leaves of an item outside the subspace from being blown up to a unit vector.
        residual = vectors / np.maximum(norms, 1e-6)
        for level in range(codes_per_item):
            residual = np.round(residual, 6)  # rows that differ by rounding noise alone are one point
            clusters = min(codebook_size, len(np.unique(residual, axis=0)))
            kmeans = KMeans(clusters, n_init=1, random_state=seed).fit(residual)
            codes[:, level] = kmeans.labels_
            residual = residual - kmeans.cluster_centers_[kmeans.labels_]
    return codes


def _disambiguate(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """int64 [num_items, codes_per_item]: `codes`, of one level less, and the level that makes the rows unique."""
    num_items, codes_per_item = codes.shape[0], codes.shape[1] + 1
    num_prefixes = codebook_size ** (codes_per_item - 1)
    # A prefix as one number, in Python's integers: codebook_size ** codes_per_item may pass 2**63.
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
        for level in range(codes_per_item - 2, -1, -1):
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
