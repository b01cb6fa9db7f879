"""Reading interaction files: every format, and every error message."""

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_interactions import sequences, write, write_npz

from stamp_kernels.profiling.data.interactions import Interactions, load_interactions


def test_npz(tmp_path: Path) -> None:
    sids = np.arange(16, dtype=np.uint8).reshape(8, 2)
    path = write_npz(
        tmp_path / "shop.npz",
        seq_items=np.array([4, 2, 0, 7, 7, 1, 2, 3], dtype=np.uint16),
        seq_offsets=np.array([0, 3, 5, 8], dtype=np.uint8),
        sids=sids,
    )
    loaded = load_interactions(str(path))
    assert loaded.name == "shop"
    assert sequences(loaded) == [[4, 2, 0], [1, 2, 3]]  # the user of 2 interactions is gone, item 7 is still an item
    assert (loaded.num_users, loaded.num_items) == (2, 8)
    assert loaded.items.dtype == loaded.offsets.dtype == loaded.semantic_ids.dtype == np.int64
    assert np.array_equal(loaded.semantic_ids, sids)
    assert loaded.source == ("shop.npz: 2 users, 8 items, 6 interactions (1 users with fewer than 3 left out)")


def test_npz_without_semantic_ids_and_by_content(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "made.npz", seq_items=[4, 2, 0], seq_offsets=[0, 3])
    loaded = load_interactions(path.rename(tmp_path / "made.data"))
    assert loaded.semantic_ids is None
    assert loaded.num_items == 5
    assert loaded.source == "made.data: 1 users, 5 items, 3 interactions"


INTER = (
    "item_id:token\tuser_id:token\trating:float\ttimestamp:float\n"
    "b\tu2\t1\t30\n"
    "a\tu1\t1\t20\n"
    "c\tu2\t1\t10.5\n"
    "d\tu1\t1\t20\n"
    "a\tu2\t1\t9\n"
    "c\tu1\t1\t1e1\n"
    "\n"
)


@pytest.mark.parametrize("name", ["shop.inter", "shop.tsv"])
def test_inter_is_ordered_by_timestamp(tmp_path: Path, name: str) -> None:
    loaded = load_interactions(write(tmp_path / name, INTER))
    assert sequences(loaded) == [[2, 0, 3], [0, 2, 1]]  # u1: c a d (a before d as in the file), u2: a c b
    assert loaded.num_items == 4
    assert loaded.semantic_ids is None


@pytest.mark.parametrize("column, value", [("rating:float", "1"), ("timestamp:float", "1")])
def test_inter_keeps_the_order_of_equal_timestamps(tmp_path: Path, column: str, value: str) -> None:
    """Or of the whole file, if it has no timestamps."""
    histories: dict[int, list[int]] = {user: [] for user in range(3)}
    lines = [f"user_id:token\titem_id:token\t{column}"]
    for user, item in np.random.default_rng(0).integers(0, (3, 10), (500, 2)).tolist():
        histories[user].append(item)
        lines.append(f"{user}\t{item}\t{value}")
    assert sequences(load_interactions(write(tmp_path / "shop.inter", "\n".join(lines)))) == list(histories.values())


def test_timestamps_are_compared_with_all_digits(tmp_path: Path) -> None:
    """Nanoseconds, numbers beyond 64 bits and fractions, which floats round, against Python's exact fractions."""
    base = 1_700_000_000_123_456_789
    times = [f"{base + step}" for step in (5, 3, 4, 0, 2, 1)]
    times += [f"{base}.75", f"{base}.5", f"{base + 1}.0", f"{2**64 + 1}", f"{2**64}", "-3", "1e3", "-2.5"]
    lines = [f"u\t{item:02}\t{time}" for item, time in enumerate(times)]
    header = "user_id:token\titem_id:token\ttimestamp:float"
    loaded = load_interactions(write(tmp_path / "shop.inter", "\n".join([header, *lines])))
    assert loaded.items.tolist() == sorted(range(len(times)), key=lambda item: Fraction(times[item]))


def test_text(tmp_path: Path) -> None:
    path = write(tmp_path / "shop.txt", "7 30 10 20\r\n3 50 30\n\n9 10 0 10 20\n")
    loaded = load_interactions(path)
    assert sequences(loaded) == [[3, 1, 2], [1, 0, 1, 2]]
    assert loaded.num_items == 5  # item 50 of the dropped user keeps its number
    assert loaded.name == "shop"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=8))
def test_formats_agree(tmp_path_factory: pytest.TempPathFactory, histories: list[list[int]]) -> None:
    folder = tmp_path_factory.mktemp("formats")
    kept = [history for history in histories if len(history) >= 3]
    used = sorted({item for history in histories for item in history})
    # Two digits, so that the order of the tokens as text is the order of the numbers.
    inter = [f"{user:02}\t{item:02}\t{time}" for user, h in enumerate(histories) for time, item in enumerate(h)]
    paths = [
        write(folder / "a.txt", "\n".join(" ".join(map(str, [user, *h])) for user, h in enumerate(histories))),
        write(folder / "a.inter", "\n".join(["user_id:token\titem_id:token\ttimestamp:float", *reversed(inter)])),
    ]
    for path in paths:
        if not kept:
            with pytest.raises(ValueError, match=r"users has 3 interactions or more"):
                load_interactions(path)
        else:
            loaded = load_interactions(path)
            assert sequences(loaded) == [[used.index(item) for item in history] for history in kept]
            assert loaded.num_items == len(used)


BAD_NPZ = {
    "no items": (dict(seq_offsets=[0, 3]), "no array seq_items, found ['seq_offsets'], expected seq_items and"),
    "no offsets": (dict(seq_items=[0, 1, 2]), "no array seq_offsets, found ['seq_items'], expected seq_items and"),
    "float items": (dict(seq_items=[0.5, 1, 2], seq_offsets=[0, 3]), "seq_items is float64 [3], expected integers"),
    "2-D offsets": (
        dict(seq_items=[0, 1, 2], seq_offsets=[[0, 3]]),
        "seq_offsets is int64 [1, 2], expected integers with 1 dimension",
    ),
    "1-D sids": (
        dict(seq_items=[0, 1, 2], seq_offsets=[0, 3], sids=[1, 2, 3]),
        "sids is int64 [3], expected integers with 2 dimension",
    ),
    "no codes": (
        dict(seq_items=[0, 1, 2], seq_offsets=[0, 3], sids=np.zeros((3, 0), dtype=int)),
        "semantic IDs have shape [3, 0], expected [3 items, codes_per_item]",
    ),
    "negative code": (
        dict(seq_items=[0, 1, 2], seq_offsets=[0, 3], sids=[[0], [-7], [1]]),
        "found semantic-ID code -7, expected codes of at least 0",
    ),
    "negative item": (
        dict(seq_items=[0, -4, 2], seq_offsets=[0, 3]),
        "found item -4, expected item numbers of at least 0",
    ),
    "item without sid": (
        dict(seq_items=[0, 3, 2], seq_offsets=[0, 3], sids=[[0], [1], [2]]),
        "found item 3, expected item numbers below 3, the number of items",
    ),
    "item beyond 63 bits": (
        dict(seq_items=np.array([0, 1, 2**63], dtype=np.uint64), seq_offsets=[0, 3]),
        "seq_items has the number 9223372036854775808, expected at most 2**63 - 1",
    ),
    "item of a gap": (
        dict(seq_items=[0, 1, 3 * 10**9], seq_offsets=[0, 3]),
        "found 3000000001 items, expected at most 100000000: number the items from 0 without gaps",
    ),
    "first offset": (dict(seq_items=[0, 1, 2], seq_offsets=[1, 3]), "offsets start with 1, expected 0"),
    "empty offsets": (
        dict(seq_items=[0, 1, 2], seq_offsets=np.zeros(0, dtype=int)),
        "offsets start with nothing, expected 0",
    ),
    "decreasing offsets": (
        dict(seq_items=[0, 1, 2], seq_offsets=np.array([0, 3, 2, 3], dtype=np.uint8)),
        "offsets decrease from 3 to 2 at user 1, expected offsets that never decrease",
    ),
    "last offset": (
        dict(seq_items=[0, 1, 2, 3], seq_offsets=[0, 3]),
        "offsets end with 3, expected the number of interactions, 4",
    ),
    "short users": (dict(seq_items=[0, 1, 2], seq_offsets=[0, 2, 3]), "none of the 2 users has 3 interactions or more"),
    "pickled": (dict(seq_items=np.array([{}]), seq_offsets=[0, 1]), "not a readable .npz archive (Object arrays"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz(tmp_path: Path, case: str) -> None:
    arrays, text = BAD_NPZ[case]
    with pytest.raises(ValueError) as error:
        load_interactions(write_npz(tmp_path / "bad.npz", **arrays))
    assert str(error.value).startswith("bad.npz: ")
    assert text in str(error.value)


def test_damaged_npz(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "bad.npz", seq_items=np.arange(1000), seq_offsets=[0, 1000])
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[1000] ^= 0xFF
    for content in (whole[:2000], bytes(flipped), b"no archive"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^bad\.npz: not a readable \.npz archive.*expected one with seq_items"):
            load_interactions(path)


HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"
BAD_TEXT = {
    "word": ("a.txt", "1 2 3 4\n2 5 x 7\n", "a.txt: line 2: found '2 5 x 7', expected integers: user item item ..."),
    "fraction": ("a.txt", "1 2 3.5 4\n", "a.txt: line 1: found '1 2 3.5 4', expected integers"),
    "too large": ("a.txt", f"1 2 3 {2**63}\n", "a.txt: line 1: found '1 2 3 9223372036854775808', expected integers"),
    "negative": ("a.txt", "1 2 3 4\n\n2 5 -6 7\n", "a.txt: line 3: found item -6, expected items of at least 0"),
    "user twice": (
        "a.txt",
        "8 2 3 4\n9 1 2 3\n8 5 6 7\n",
        "a.txt: line 3: found user 8 again (first on line 1), expected one line per user",
    ),
    "blank": ("a.txt", "\n \n", "a.txt: none of the 0 users has 3 interactions or more"),
    "short users": ("a.txt", "1 2 3\n2 4 5\n", "a.txt: none of the 2 users has 3 interactions or more"),
    "ragged": ("a.inter", HEADER + "1\t2\t3\n1\t3\n", "a.inter: line 3: found 2 columns, expected the header's 3"),
    "no item": ("a.inter", HEADER + "1\t\t3\n", "a.inter: line 2: found an empty user or item, expected a token"),
    "no user": ("a.inter", HEADER + "\t1\t3\n", "a.inter: line 2: found an empty user or item, expected a token"),
    "timestamp": (
        "a.inter",
        HEADER + "1\t2\t3\n\n1\t2\tnoon\n",
        "a.inter: line 4: found the timestamp 'noon', expected a finite number",
    ),
    "infinity": (
        "a.inter",
        HEADER + "1\t2\t-inf\n",
        "a.inter: line 2: found the timestamp '-inf', expected a finite number",
    ),
    "NaN": ("a.inter", HEADER + "1\t2\tnan\n", "a.inter: line 2: found the timestamp 'nan', expected a finite number"),
    "no user column": (
        "a.inter",
        "uid:token\titem_id:token\n",
        "a.inter: line 1: no column user_id:token, found ['uid:token', 'item_id:token'], expected tab-separated",
    ),
    "no item column": (
        "a.inter",
        "user_id:token\n",
        "a.inter: line 1: no column item_id:token, found ['user_id:token']",
    ),
    "header only": ("a.inter", HEADER, "a.inter: none of the 0 users has 3 interactions or more"),
    "nothing": ("a.txt", "", "a.txt: the file is empty, expected interactions"),
    "empty npz": ("a.npz", "", "a.npz: the file is empty, expected interactions"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_text(tmp_path: Path, case: str) -> None:
    name, content, text = BAD_TEXT[case]
    with pytest.raises(ValueError) as error:
        load_interactions(write(tmp_path / name, content))
    assert str(error.value).startswith(text)


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.txt: no such file"):
        load_interactions(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="not a file, expected an"):
        load_interactions(tmp_path)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"1 2 \xff")
    with pytest.raises(
        ValueError, match=r"^binary\.txt: not UTF-8 text \(invalid start byte at byte 4\), expected text"
    ):
        load_interactions(binary)


def fake_recbole(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, content)
    info = folder / "recbole-0.dist-info"
    info.mkdir()
    write(info / "METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 0\n")
    write(info / "RECORD", "".join(f"{name},,\n" for name in files))


def test_movielens_comes_from_the_installed_recbole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_recbole(
        tmp_path,
        {
            "recbole/__init__.py": "raise AssertionError('imported')",
            "recbole/dataset_example/ml-100k/ml-100k.item": "item_id:token\n",
            "recbole/dataset_example/ml-100k/ml-100k.inter": INTER,
        },
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = load_interactions(None)
    assert sequences(loaded) == [[2, 0, 3], [0, 2, 1]]
    assert loaded.source == "ml-100k.inter: 2 users, 4 items, 6 interactions"
    assert "recbole" not in sys.modules


def test_movielens_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path)])
        with pytest.raises(FileNotFoundError, match="pip install --no-deps recbole"):
            load_interactions(None)
    fake_recbole(tmp_path, {"recbole/__init__.py": ""})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps recbole"):
        load_interactions(None)


def test_interactions_checks_itself() -> None:
    items, offsets = np.arange(3), np.array([0, 3])
    for arguments, text in [
        ((items.astype(np.int32), offsets, 3, None), r"^x: items must be int64 with 1 dimension, got int32 \[3\]"),
        ((items, offsets[None], 3, None), r"^x: offsets must be int64 with 1 dimension, got int64 \[1, 2\]"),
        ((items, offsets, 3, np.zeros((3, 2))), r"^x: semantic_ids must be int64, got float64 \[3, 2\]"),
        ((items, offsets, 3, np.zeros((2, 2), np.int64)), r"^x: semantic IDs have shape \[2, 2\], expected \[3 items"),
        ((items, offsets, 2, None), r"^x: found item 2, expected item numbers below 2"),
        ((items, np.array([0, 1, 3]), 3, None), r"^x: found a user with 1 interactions, expected at least 3"),
        ((items[:0], offsets[:1], 3, None), r"^x: found no users, expected at least one"),
    ]:
        with pytest.raises(ValueError, match=text):
            Interactions("x", *arguments, source="")
