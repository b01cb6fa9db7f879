"""Semantic IDs for items that have none, made from the interactions with them."""

import hashlib
import os
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

from stamp_kernels.ops._checks import check_count
from stamp_kernels.profiling.data.interactions import HELD_OUT, Interactions, in_training_part

SVD_DIMENSIONS = 64
# Part of the cache key. Increase it when `_residual_kmeans` or `_disambiguate` gives other codes for the same input.
SEMANTIC_ID_VERSION = 1


def assign_semantic_ids(
    interactions: Interactions,
    *,
    codes_per_item: int = 4,
    codebook_size: int = 256,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> np.ndarray:
    """Make unique semantic IDs from the training interactions.

    A truncated SVD of the item x user counts of the training part (every sequence without its last two items) gives
    each item a vector. The vectors are L2-normalised and coded by residual k-means with `codes_per_item - 1` levels.
    The last level makes equal codes unique (0, 1, 2, ... in order of item number), as in TIGER. If more than
    `codebook_size` items share a prefix, as items outside the training part may, the remaining ones take the next
    prefix in lexicographic order that has codes left (after the last prefix comes the first).

    The same arguments give the same IDs, whatever the number of threads. They are cached in
    `<cache_dir>/semantic_ids_<hash of the training interactions and the arguments>.npz`. A damaged file is made again;
    a directory that cannot be written causes a RuntimeWarning.

    Args:
        interactions: the sequences; their own `semantic_ids` are not read.
        codes_per_item: at least 1.
        codebook_size: codes per level, at least 1.
        seed: of the SVD and of k-means.
        cache_dir: None: `stamp_kernels` in `$XDG_CACHE_HOME`, or in `~/.cache`.

    Returns:
        int64 `[num_items, codes_per_item]`, codes in `[0, codebook_size)`; no two items have the same.

    Raises:
        ValueError: `codes_per_item` or `codebook_size` is below 1, or there are more items than IDs.
        ImportError: scikit-learn is missing and the IDs are not in the cache.
    """
    check_count("codes_per_item", codes_per_item, 1)
    check_count("codebook_size", codebook_size, 1)
    if interactions.num_items > codebook_size**codes_per_item:
        raise ValueError(
            f"codebook_size ** codes_per_item must be at least the number of items, {interactions.num_items}, "
            f"got {codebook_size} ** {codes_per_item}"
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
        # A single user gets a second, empty column: TruncatedSVD needs two.
        shape = (interactions.num_items, max(2, interactions.num_users))
        codes = _residual_kmeans(users, items, shape, codes_per_item - 1, codebook_size, seed)
        semantic_ids = _disambiguate(codes, codebook_size)
        _write_cache(path, semantic_ids)
    return semantic_ids


def _residual_kmeans(
    users: np.ndarray, items: np.ndarray, shape: tuple[int, int], num_levels: int, codebook_size: int, seed: int
) -> np.ndarray:
    """int64 `[num_items, num_levels]`: codes of the items' vectors.

    Args:
        users, items: int64 `[n]`, the two sides of each interaction.
        shape: of the matrix of counts, `(num_items, num_users)`.
        num_levels: may be 0.
        codebook_size: the most clusters per level.
        seed: of the SVD and of k-means.
    """
    codes = np.zeros((shape[0], num_levels), dtype=np.int64)
    if num_levels == 0:
        return codes
    try:  # Imported here: data with semantic IDs needs no scikit-learn.
        from scipy.sparse import csr_matrix
        from sklearn.cluster import KMeans
        from sklearn.decomposition import TruncatedSVD
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError("making semantic IDs needs scikit-learn: run `pip install scikit-learn`") from error

    counts = csr_matrix((np.ones(len(items)), (items, users)), shape=shape)
    # One thread: the last bits of parallel sums, and so a few codes, would depend on the number of threads.
    # errstate: the explained variance, which is not used, divides by zero if all rows are equal.
    with threadpool_limits(limits=1), np.errstate(divide="ignore", invalid="ignore"):
        vectors = TruncatedSVD(min(SVD_DIMENSIONS, *shape), random_state=seed).fit_transform(counts)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        # An item outside the subspace has only rounding errors left. The floor keeps them from becoming a unit vector.
        residual = vectors / np.maximum(norms, 1e-6)
        for level in range(num_levels):
            residual = np.round(residual, 6)  # rows that differ only by rounding errors become one point
            clusters = min(codebook_size, len(np.unique(residual, axis=0)))
            kmeans = KMeans(clusters, n_init=1, random_state=seed).fit(residual)
            codes[:, level] = kmeans.labels_
            residual = residual - kmeans.cluster_centers_[kmeans.labels_]
    return codes


def _disambiguate(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """int64 `[num_items, codes_per_item]`: `codes`, with one level fewer, and the level that makes the rows unique."""
    num_items, codes_per_item = codes.shape[0], codes.shape[1] + 1
    num_prefixes = codebook_size ** (codes_per_item - 1)
    # A prefix as one number. Python's integers, since codebook_size ** codes_per_item may exceed 2**63.
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

    search_from: dict[int, int] = {}  # a full prefix stays full, so a search continues where the last one ended
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
        # np.load leaves a damaged file open if it opens it itself.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            semantic_ids: np.ndarray = archive["semantic_ids"]
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    if semantic_ids.shape != shape or semantic_ids.dtype != np.int64:
        return None
    if semantic_ids.min() < 0 or semantic_ids.max() >= codebook_size:
        return None
    return semantic_ids


def _write_cache(path: Path, semantic_ids: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with open(descriptor, "wb") as file:
                np.savez_compressed(file, semantic_ids=semantic_ids)
            os.replace(temporary, path)  # a reader finds the whole file or none
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        warnings.warn(
            f"the semantic IDs were not cached, {path} cannot be written: {error}", RuntimeWarning, stacklevel=3
        )
