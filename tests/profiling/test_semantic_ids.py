"""Semantic IDs: unique, seeded, made only from the training part, cached."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_interactions import HISTORIES, make_interactions, random_interactions
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_info, threadpool_limits

from stamp_kernels.profiling.data import semantic_ids as semantic_ids_module
from stamp_kernels.profiling.data.interactions import Interactions
from stamp_kernels.profiling.data.semantic_ids import assign_semantic_ids


def assert_unique_codes(semantic_ids: np.ndarray, num_items: int, codes_per_item: int, codebook_size: int) -> None:
    assert semantic_ids.shape == (num_items, codes_per_item)
    assert semantic_ids.dtype == np.int64
    assert semantic_ids.min() >= 0
    assert semantic_ids.max() < codebook_size
    assert len(np.unique(semantic_ids, axis=0)) == num_items


def test_semantic_ids_are_seeded_and_unique(tmp_path: Path) -> None:
    interactions = random_interactions(0)
    first = assign_semantic_ids(interactions, codes_per_item=3, codebook_size=8, cache_dir=tmp_path / "a")
    again = assign_semantic_ids(interactions, codes_per_item=3, codebook_size=8, cache_dir=tmp_path / "b")
    other = assign_semantic_ids(interactions, codes_per_item=3, codebook_size=8, seed=1, cache_dir=tmp_path / "a")
    assert_unique_codes(first, 40, 3, 8)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(np.unique(first[:, 0])) == 8  # k-means uses its codebook


def test_semantic_ids_follow_the_users(tmp_path: Path) -> None:
    # Two groups of items that no user mixes, even and odd numbers: no first code occurs in both.
    rng = np.random.default_rng(0)
    histories = [(2 * rng.permutation(12)[: rng.integers(5, 13)] + rng.integers(2)).tolist() for _ in range(80)]
    ids = assign_semantic_ids(make_interactions(histories), codes_per_item=4, codebook_size=4, cache_dir=tmp_path)
    assert set(ids[::2, 0]).isdisjoint(ids[1::2, 0])


def test_users_are_paired_with_training_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = []

    def record(users: np.ndarray, items: np.ndarray, shape: tuple[int, int], *_: object) -> np.ndarray:
        pairs.extend(zip(users.tolist(), items.tolist(), strict=True))
        return np.zeros((shape[0], 1), dtype=np.int64)

    monkeypatch.setattr(semantic_ids_module, "_residual_kmeans", record)
    assign_semantic_ids(make_interactions(HISTORIES), codes_per_item=2, codebook_size=6, cache_dir=tmp_path)
    assert pairs == [(user, item) for user, history in enumerate(HISTORIES) for item in history[:-2]]


def test_semantic_ids_number_equal_prefixes_by_item(tmp_path: Path) -> None:
    # Items 0, 2, 4 have the same users, and so do 1, 3, 5; items 6 to 8 are only held out.
    histories = [[0, 2, 4, 6, 7], [1, 3, 5, 7, 8], [4, 2, 0, 8, 6], [5, 3, 1, 6, 8]]
    ids = assign_semantic_ids(make_interactions(histories), codes_per_item=3, codebook_size=4, cache_dir=tmp_path)
    for group in ([0, 2, 4], [1, 3, 5], [6, 7, 8]):
        assert len(np.unique(ids[group, :2], axis=0)) == 1
        assert ids[group, 2].tolist() == [0, 1, 2]
    assert len(np.unique(ids[:, :2], axis=0)) == 3


def test_semantic_ids_overflow(tmp_path: Path) -> None:
    # 12 of 15 items are cold and share a prefix that has 4 codes: all 16 IDs except one are needed.
    interactions = make_interactions([[0, 1, 2, 3, 4]] * 3, num_items=15)
    ids = assign_semantic_ids(interactions, codes_per_item=2, codebook_size=4, cache_dir=tmp_path)
    assert_unique_codes(ids, 15, 2, 4)
    cold = ids[3, 0]
    assert ids[3:7].tolist() == [[cold, code] for code in range(4)]  # the first items stay
    assert ids[:3, 0].tolist() == [ids[0, 0]] * 3
    assert ids[0, 0] != cold


def test_disambiguation_moves_on_to_the_next_prefix() -> None:
    #         0       1       2       3       4       5       6        prefixes of 2 x 2 codes, 2 IDs each
    codes = [[1, 0], [1, 0], [1, 0], [1, 1], [1, 1], [1, 0], [0, 0]]
    ids = semantic_ids_module._disambiguate(np.array(codes), 2)
    assert ids[[0, 1]].tolist() == [[1, 0, 0], [1, 0, 1]]
    assert ids[[3, 4]].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert ids[6].tolist() == [0, 0, 0]
    assert ids[2].tolist() == [0, 0, 1]  # [1, 1] is full, so it wraps around to [0, 0], after the item with that prefix
    assert ids[5].tolist() == [0, 1, 0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_disambiguation_moves_only_what_it_must(draw: st.DataObject) -> None:
    codes_per_item, codebook_size = draw.draw(st.integers(1, 3)), draw.draw(st.integers(1, 3))
    num_items = draw.draw(st.integers(1, codebook_size**codes_per_item))
    code = st.integers(0, codebook_size - 1)
    codes = draw.draw(st.lists(st.tuples(*[code] * (codes_per_item - 1)), min_size=num_items, max_size=num_items))
    ids = semantic_ids_module._disambiguate(
        np.array(codes, dtype=np.int64).reshape(num_items, codes_per_item - 1), codebook_size
    )
    assert_unique_codes(ids, num_items, codes_per_item, codebook_size)
    for item, prefix in enumerate(codes):
        rank = codes[:item].count(prefix)
        if rank < codebook_size:
            assert ids[item].tolist() == [*prefix, rank]


def test_large_codebooks_do_not_wrap() -> None:
    codes = np.array([[65535] * 4, [65535] * 4, [0] * 4])
    assert semantic_ids_module._disambiguate(codes, 65536).tolist() == [[65535] * 4 + [0], [65535] * 4 + [1], [0] * 5]


@pytest.mark.parametrize("codes_per_item, codebook_size", [(1, 40), (2, 7), (3, 256), (6, 2)])
def test_semantic_ids_sizes(tmp_path: Path, codes_per_item: int, codebook_size: int) -> None:
    ids = assign_semantic_ids(
        random_interactions(1), codes_per_item=codes_per_item, codebook_size=codebook_size, cache_dir=tmp_path
    )
    assert_unique_codes(ids, 40, codes_per_item, codebook_size)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 11), min_size=1, max_size=12), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(2, 20),
)
@example([{0}], 1, 2)
@example([set(range(12))] * 3, 1, 4)
@example([set(range(12))] * 6, 3, 20)
def test_items_with_equal_users_have_equal_codes(training: list[set[int]], copies: int, codebook_size: int) -> None:
    # A user who has an item has all its copies. The items without users are a group too.
    pairs = [(user, item * copies + i) for user, items in enumerate(training) for item in items for i in range(copies)]
    users, items = np.array(pairs).T
    shape = (12 * copies, max(2, len(training)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes = semantic_ids_module._residual_kmeans(users, items, shape, 3, codebook_size, 0)
    groups: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for item in range(shape[0]):
        groups.setdefault(tuple(users[items == item]), set()).add(tuple(codes[item]))
    assert all(len(group) == 1 for group in groups.values())
    assert codes.min() >= 0
    assert codes.max() < min(codebook_size, len(groups))


def test_items_outside_the_subspace_count_as_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three groups of items that no user mixes, and two dimensions: the smallest group has only rounding errors left.
    monkeypatch.setattr(semantic_ids_module, "SVD_DIMENSIONS", 2)
    rng = np.random.default_rng(0)
    groups = [np.arange(4)] * 30 + [np.arange(4, 8)] * 15 + [np.arange(8, 12)] * 2
    pairs = [(user, item) for user, group in enumerate(groups) for item in rng.permutation(group)[:3]]
    users, items = np.array(pairs).T
    codes = semantic_ids_module._residual_kmeans(users, items, (13, len(groups)), 3, 8, 0)
    assert len(np.unique(codes[8:], axis=0)) == 1
    assert len(np.unique(codes[:8], axis=0)) == len(np.unique(codes, axis=0)) - 1


def test_semantic_ids_of_one_user_and_one_item(tmp_path: Path) -> None:
    for histories in ([[0, 0, 0]], [[0, 1, 2]], [[0, 1, 0, 1]] * 3):
        interactions = make_interactions(histories)
        ids = assign_semantic_ids(interactions, codes_per_item=3, codebook_size=4, cache_dir=tmp_path)
        assert_unique_codes(ids, interactions.num_items, 3, 4)


def test_semantic_ids_are_made_on_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The last bits of a parallel sum depend on the number of threads, and so do a few codes.
    threads = []
    fit = KMeans.fit

    def recorded(self: KMeans, *arguments: object) -> KMeans:
        threads.extend(pool["num_threads"] for pool in threadpool_info())
        return fit(self, *arguments)

    monkeypatch.setattr(KMeans, "fit", recorded)
    with threadpool_limits(limits=2):
        assign_semantic_ids(random_interactions(0), codebook_size=8, cache_dir=tmp_path)
    assert set(threads) == {1}


def test_semantic_ids_read_only_the_training_part(tmp_path: Path) -> None:
    interactions = random_interactions(2)
    changed = interactions.items.copy()
    for end in interactions.offsets[1:]:
        changed[end - 2 : end] = (changed[end - 2 : end] + 7) % interactions.num_items
    held_out = Interactions("other", changed, interactions.offsets, interactions.num_items, None, "other")
    changed = interactions.items.copy()
    changed[0] = (changed[0] + 7) % interactions.num_items
    trained_on = Interactions("other", changed, interactions.offsets, interactions.num_items, None, "other")

    # Separate folders, so that none reads the cache of another.
    ids = [
        assign_semantic_ids(each, codes_per_item=3, codebook_size=8, cache_dir=tmp_path / str(i))
        for i, each in enumerate([interactions, held_out, trained_on])
    ]
    assert np.array_equal(ids[0], ids[1])
    assert not np.array_equal(ids[0], ids[2])
    names = [[file.name for file in (tmp_path / str(i)).iterdir()] for i in range(3)]
    assert names[0] == names[1]
    assert names[0] != names[2]


def test_cache_is_read_per_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interactions = random_interactions(3)
    arguments = [
        dict(codes_per_item=3, codebook_size=8, seed=0),
        dict(codes_per_item=4, codebook_size=8, seed=0),
        dict(codes_per_item=3, codebook_size=9, seed=0),
        dict(codes_per_item=3, codebook_size=8, seed=1),
    ]
    made = [assign_semantic_ids(interactions, **each, cache_dir=tmp_path) for each in arguments]
    assert len(list(tmp_path.iterdir())) == 4  # one file each, nothing temporary
    monkeypatch.setattr(semantic_ids_module, "_residual_kmeans", lambda *_: pytest.fail("computed again"))
    for each, ids in zip(arguments, made, strict=True):
        assert np.array_equal(assign_semantic_ids(interactions, **each, cache_dir=tmp_path), ids)


def test_cache_tells_users_apart(tmp_path: Path) -> None:
    # The same training items in the same order, split between the users at another place.
    for histories in ([[0, 1, 2, 5, 5], [3, 4, 5, 5]], [[0, 1, 5, 5], [2, 3, 4, 5, 5]]):
        assign_semantic_ids(make_interactions(histories), codes_per_item=2, codebook_size=4, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_cache_is_made_again(tmp_path: Path) -> None:
    interactions = random_interactions(3)
    made = assign_semantic_ids(interactions, codes_per_item=3, codebook_size=8, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF

    def saved(**arrays: np.ndarray) -> bytes:
        np.savez(path, **arrays)
        return path.read_bytes()

    array_only = tmp_path / "array.npy"
    np.save(array_only, made)
    damaged = [b"", b"junk", whole[:50], bytes(flipped), array_only.read_bytes(), saved(other=made)]
    damaged += [saved(semantic_ids=made[1:]), saved(semantic_ids=made + 8), saved(semantic_ids=made - 8)]
    damaged += [saved(semantic_ids=made.astype(np.float64))]
    for content in damaged:
        path.write_bytes(content)
        assert np.array_equal(
            assign_semantic_ids(interactions, codes_per_item=3, codebook_size=8, cache_dir=tmp_path), made
        )
        with np.load(path) as archive:
            assert np.array_equal(archive["semantic_ids"], made)


def test_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(semantic_ids_module.os, "replace", full_disk)
    with pytest.warns(RuntimeWarning, match=r"the semantic IDs were not cached, .*cannot be written: no space left"):
        ids = assign_semantic_ids(random_interactions(3), codes_per_item=3, codebook_size=8, cache_dir=tmp_path)
    assert_unique_codes(ids, 40, 3, 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_default_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assign_semantic_ids(make_interactions(HISTORIES), codes_per_item=1)
    folder = tmp_path / "stamp_kernels" if variable == "XDG_CACHE_HOME" else tmp_path / ".cache" / "stamp_kernels"
    (file,) = folder.iterdir()
    assert file.name.startswith("semantic_ids_")


def test_semantic_id_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interactions = make_interactions(HISTORIES)  # 6 items
    with pytest.raises(
        ValueError, match=r"codebook_size \*\* codes_per_item must be at least the number of items, 6, got 2 \*\* 2"
    ):
        assign_semantic_ids(interactions, codes_per_item=2, codebook_size=2, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"codes_per_item must be in \[1, inf\), got 0"):
        assign_semantic_ids(interactions, codes_per_item=0, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"codebook_size must be in \[1, inf\), got 0"):
        assign_semantic_ids(interactions, codebook_size=0, cache_dir=tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        assign_semantic_ids(interactions, cache_dir=tmp_path)
