"""Small interaction data and files for the tests."""

from pathlib import Path

import numpy as np

from stamp_kernels.profiling.data.interactions import Interactions

HISTORIES = [[0, 1, 2, 3, 4, 5, 1], [3, 2, 4], [5, 0, 1, 2], [2, 2, 3, 1, 0, 4, 5, 3, 2, 1]]


def make_interactions(histories: list[list[int]], num_items: int | None = None) -> Interactions:
    items = np.array([item for history in histories for item in history], dtype=np.int64)
    offsets = np.cumsum([0, *map(len, histories)])
    return Interactions("made", items, offsets, num_items or int(items.max()) + 1, None, "made by hand")


def random_interactions(seed: int, users: int = 60, num_items: int = 40) -> Interactions:
    rng = np.random.default_rng(seed)
    histories = [rng.integers(0, num_items, rng.integers(3, 15)).tolist() for _ in range(users)]
    return make_interactions(histories, num_items)


def sequences(interactions: Interactions) -> list[list[int]]:
    return [items.tolist() for items in np.split(interactions.items, interactions.offsets[1:-1])]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **{key: np.asarray(array) for key, array in arrays.items()})
    return path
