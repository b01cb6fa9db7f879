"""The planner of the CPU's cross-entropy (csrc/cpu/cross_entropy/plan.cpp), compiled by itself and called by ctypes.

It knows neither torch nor the number of threads: it gets sizes, and returns how rows and classes are divided. That the
bits of a result do not depend on the number of threads, test_cross_entropy_cpu.py checks with the ops.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROW_MULTIPLE = 32
MiB = 1 << 20
WRAPPER = """
#include "cpu/cross_entropy/kernels.h"
#include "cpu/cross_entropy/plan.cpp"

using namespace stamp::cpu;

extern "C" {
int64_t row_multiple() { return kRowMultiple; }
int64_t bytes_of_sizes() { return sizeof(SoftmaxSizes); }
int64_t bytes_of_plan() { return sizeof(CrossEntropyPlan); }
void plan(const SoftmaxSizes* sizes, CrossEntropyPlan* plan) { *plan = plan_cross_entropy(*sizes); }
}
"""


class SoftmaxSizes(ctypes.Structure):
    """`SoftmaxSizes` of plan.h."""

    _fields_ = [
        ("num_rows", ctypes.c_int64),
        ("num_classes", ctypes.c_int64),
        ("padded_width", ctypes.c_int64),
        ("scalar_bytes", ctypes.c_int64),
        ("needs_gradients", ctypes.c_bool),
        ("has_lse", ctypes.c_bool),
    ]

    def __repr__(self) -> str:
        return f"SoftmaxSizes({', '.join(f'{name}={getattr(self, name)}' for name, _ in self._fields_)})"

    @property
    def row_bytes(self) -> int:
        return self.padded_width * self.scalar_bytes

    def but(self, **changes: int) -> "SoftmaxSizes":
        return SoftmaxSizes(**{name: getattr(self, name) for name, _ in self._fields_} | changes)


class Plan(ctypes.Structure):
    """`CrossEntropyPlan` of plan.h."""

    _fields_ = [
        ("num_row_splits", ctypes.c_int64),
        ("rows_per_split", ctypes.c_int64),
        ("rows_per_chunk", ctypes.c_int64),
        ("rows_per_block", ctypes.c_int64),
        ("num_class_splits", ctypes.c_int64),
        ("classes_per_split", ctypes.c_int64),
        ("classes_per_chunk", ctypes.c_int64),
        ("keeps_logits", ctypes.c_bool),
        ("logits_size", ctypes.c_int64),
        ("grad_hidden_splits_size", ctypes.c_int64),
        ("grad_weight_splits_size", ctypes.c_int64),
    ]

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name, _ in self._fields_}


Planner = Callable[[SoftmaxSizes], Plan]


@pytest.fixture(scope="session")
def planner(tmp_path_factory) -> Planner:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler, c++")
    folder = tmp_path_factory.mktemp("cross_entropy_plan")
    source, library = folder / "plan.cpp", folder / "plan.so"
    source.write_text(WRAPPER)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-I", str(Path(__file__).parents[2] / "csrc")]
    subprocess.run([compiler, *flags, "-fPIC", "-shared", "-o", str(library), str(source)], check=True)
    loaded = ctypes.CDLL(str(library))
    for function in (loaded.row_multiple, loaded.bytes_of_sizes, loaded.bytes_of_plan):
        function.restype = ctypes.c_int64
    assert loaded.row_multiple() == ROW_MULTIPLE
    assert loaded.bytes_of_sizes() == ctypes.sizeof(SoftmaxSizes)
    assert loaded.bytes_of_plan() == ctypes.sizeof(Plan)
    loaded.plan.argtypes = [ctypes.POINTER(SoftmaxSizes), ctypes.POINTER(Plan)]
    loaded.plan.restype = None

    def run(sizes: SoftmaxSizes) -> Plan:
        plan = Plan()
        loaded.plan(sizes, plan)
        return plan

    return run


def counts(minimum: int, maximum: int) -> st.SearchStrategy[int]:
    """Small numbers, numbers around powers of two and around multiples of the blocks, and any."""
    around = st.one_of(
        st.integers(0, maximum.bit_length() - 1).map(lambda bits: 1 << bits),
        st.integers(0, 64).map(lambda n: 128 * n),
    )
    near = st.tuples(around, st.integers(-2, 2)).map(sum)
    return st.one_of(st.integers(minimum, minimum + 300), near, st.integers(minimum, maximum)).map(
        lambda n: min(max(n, minimum), maximum)
    )


all_sizes = st.builds(
    SoftmaxSizes,
    num_rows=counts(0, 1 << 31),
    num_classes=counts(1, 1 << 31),
    padded_width=counts(0, 1 << 12).map(lambda n: 16 * n) | st.just(0),
    scalar_bytes=st.sampled_from([4, 8]),
    needs_gradients=st.booleans(),
    has_lse=st.booleans(),
)


def divide_up(n: int, divisor: int) -> int:
    return -(-n // divisor)


def round_up(n: int, multiple: int) -> int:
    return divide_up(n, multiple) * multiple


@given(sizes=all_sizes)
def test_splits_cover_rows_and_classes_exactly(planner, sizes):
    """Every row and class is in one split, and no split is empty (but the only one of no rows)."""
    plan = planner(sizes)
    if plan.num_row_splits == 1:
        assert plan.rows_per_split == sizes.num_rows
    else:
        assert plan.num_row_splits == divide_up(sizes.num_rows, plan.rows_per_split)
    assert plan.num_class_splits == divide_up(sizes.num_classes, plan.classes_per_split)


@given(sizes=all_sizes)
def test_sizes_are_the_multiples_that_kernels_need(planner, sizes):
    plan = planner(sizes)
    assert plan.classes_per_chunk in (64, 128)
    assert plan.classes_per_split % plan.classes_per_chunk == 0
    assert plan.rows_per_block % ROW_MULTIPLE == plan.rows_per_chunk % ROW_MULTIPLE == 0
    assert 0 < plan.rows_per_block <= plan.rows_per_chunk
    assert plan.rows_per_chunk <= round_up(max(plan.rows_per_split, 1), ROW_MULTIPLE)
    if plan.num_row_splits > 1:
        assert plan.rows_per_split % ROW_MULTIPLE == 0


@given(sizes=all_sizes)
def test_threads_share_rows_or_classes(planner, sizes):
    """Never both. Many classes are shared, whatever the rows; splits of rows have at least 64 of them."""
    plan = planner(sizes)
    assert plan.num_row_splits == 1 or plan.num_class_splits == 1
    assert 1 <= plan.num_row_splits <= 16
    assert 1 <= plan.num_class_splits <= 16
    if sizes.num_classes > 1024:
        assert plan.num_class_splits >= 3
    if plan.num_row_splits > 1:
        assert plan.rows_per_split >= 64


@given(sizes=all_sizes)
def test_memory_is_counted_as_laid_out(planner, sizes):
    plan = planner(sizes)
    blocks = divide_up(plan.rows_per_chunk, plan.rows_per_block)
    assert not plan.keeps_logits or (sizes.needs_gradients and not sizes.has_lse)
    assert plan.logits_size == (blocks * sizes.num_classes * plan.rows_per_block if plan.keeps_logits else 0)
    assert plan.grad_hidden_splits_size == plan.num_class_splits * plan.rows_per_chunk * sizes.padded_width
    row_splits = plan.num_row_splits if plan.num_row_splits > 1 else 0
    assert plan.grad_weight_splits_size == row_splits * sizes.num_classes * sizes.padded_width


@given(sizes=all_sizes)
def test_memory_is_bounded(planner, sizes):
    """By constants; or, for many classes and wide rows, by what one block of rows takes or a share of all logits."""
    plan = planner(sizes)
    logits_of_row = sizes.num_classes * sizes.scalar_bytes
    caches = MiB // 2 if plan.num_row_splits > 1 else MiB
    bound = max(caches, 128 * logits_of_row, sizes.num_rows * logits_of_row // 18)
    assert plan.logits_size * sizes.scalar_bytes <= min(bound, max(caches, 256 * logits_of_row))
    # Never the logits of most rows, unless they are small.
    assert plan.logits_size * sizes.scalar_bytes <= max(64 * MiB, sizes.num_rows * logits_of_row / 2)
    assert plan.grad_hidden_splits_size * sizes.scalar_bytes <= max(16 * MiB, 8 * 128 * sizes.row_bytes)
    assert plan.grad_weight_splits_size * sizes.scalar_bytes <= 4 * MiB


@given(sizes=all_sizes)
def test_losses_have_the_same_bits_with_gradients(planner, sizes):
    """The sums of the softmax run over the same classes in the same order, whether gradients are computed or not."""

    def class_sizes(sizes: SoftmaxSizes) -> tuple[int, int, int]:
        plan = planner(sizes)
        return plan.num_class_splits, plan.classes_per_split, plan.classes_per_chunk

    assert class_sizes(sizes) == class_sizes(sizes.but(needs_gradients=not sizes.needs_gradients))
    assert class_sizes(sizes) == class_sizes(sizes.but(has_lse=not sizes.has_lse))


FORWARD = {"needs_gradients": False, "has_lse": False}
BACKWARD = {"needs_gradients": True, "has_lse": True}
WITH_GRADIENTS = {"needs_gradients": True, "has_lse": False}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        pytest.param(
            # 4 MiB hold 16 gradients of the weight (256 KiB), and 512 KiB the logits of 128 rows.
            SoftmaxSizes(4096, 1024, 64, 4, **WITH_GRADIENTS),
            Plan(16, 256, 128, 128, 1, 1024, 128, True, 128 * 1024, 128 * 64, 16 * 1024 * 64),
            id="few classes",
        ),
        pytest.param(
            # 16 splits of 65 rows, rounded up to 96: 11 are enough.
            SoftmaxSizes(1025, 100, 16, 4, **BACKWARD),
            Plan(11, 96, 96, 96, 1, 128, 64, False, 0, 96 * 16, 11 * 100 * 16),
            id="few classes, rows not a multiple",
        ),
        pytest.param(
            # 157 rows in a split, rounded up to 160: a block of 128 and one of 32, with memory for two whole ones.
            SoftmaxSizes(2500, 100, 16, 4, **WITH_GRADIENTS),
            Plan(16, 160, 160, 128, 1, 128, 64, True, 2 * 128 * 100, 160 * 16, 16 * 100 * 16),
            id="few classes, a small last block",
        ),
        pytest.param(
            # 4 MiB hold 8 gradients of the weight (512 KiB), and 512 KiB the logits of 256 rows.
            SoftmaxSizes(4096, 512, 256, 4, **WITH_GRADIENTS),
            Plan(8, 512, 256, 128, 1, 512, 64, True, 256 * 512, 256 * 256, 8 * 512 * 256),
            id="few classes, the fewest row splits",
        ),
        pytest.param(
            # They hold 7 of 513 classes, too few to share rows. 65 classes in a split, rounded up to 128: 5 splits.
            SoftmaxSizes(4096, 513, 256, 4, **BACKWARD),
            Plan(1, 4096, 512, 128, 5, 128, 128, False, 0, 5 * 512 * 256, 0),
            id="few classes, too large for row splits",
        ),
        pytest.param(
            # The logits of a block are twice as large: threads share the classes.
            SoftmaxSizes(4096, 1024, 64, 8, **FORWARD),
            Plan(1, 4096, 512, 128, 8, 128, 128, False, 0, 8 * 512 * 64, 0),
            id="few classes in float64",
        ),
        pytest.param(
            # 1 MiB holds the logits of 8 rows: one block of 4096 / 18 = 227 rows instead, rounded down.
            SoftmaxSizes(4096, 32_768, 64, 4, **WITH_GRADIENTS),
            Plan(1, 4096, 224, 224, 16, 2048, 128, True, 224 * 32_768, 16 * 224 * 64, 0),
            id="many classes",
        ),
        pytest.param(
            SoftmaxSizes(100_000, 32_768, 64, 4, **WITH_GRADIENTS),
            Plan(1, 100_000, 256, 256, 16, 2048, 128, True, 256 * 32_768, 16 * 256 * 64, 0),
            id="many classes and rows",
        ),
        pytest.param(
            # The logits of 128 rows are 64 MiB, and those of one more class would be too many to keep.
            SoftmaxSizes(128, 131_072, 64, 4, **WITH_GRADIENTS),
            Plan(1, 128, 128, 128, 16, 8192, 128, True, 128 * 131_072, 16 * 128 * 64, 0),
            id="few rows",
        ),
        pytest.param(
            # ceil(131_073 / 16) = 8193 classes in a split, rounded up to 8320.
            SoftmaxSizes(128, 131_073, 64, 4, **WITH_GRADIENTS),
            Plan(1, 128, 128, 128, 16, 8320, 128, False, 0, 16 * 128 * 64, 0),
            id="few rows of too many classes",
        ),
        pytest.param(
            # A chunk of half the rows keeps them.
            SoftmaxSizes(256, 131_073, 64, 4, **WITH_GRADIENTS),
            Plan(1, 256, 128, 128, 16, 8320, 128, True, 128 * 131_073, 16 * 128 * 64, 0),
            id="rows of two chunks",
        ),
        pytest.param(
            # ceil(5000 / 16) = 313 classes in a split, rounded up to 384: 14 splits.
            SoftmaxSizes(700, 5000, 32, 4, **FORWARD),
            Plan(1, 700, 512, 128, 14, 384, 128, False, 0, 14 * 512 * 32, 0),
            id="losses only",
        ),
        pytest.param(
            # 16 MiB hold 128 rows of 7 splits: ceil(1500 / 7) = 215 classes in one, rounded up to 256.
            SoftmaxSizes(150, 1500, 4112, 4, **WITH_GRADIENTS),
            Plan(1, 150, 128, 128, 6, 256, 128, True, 128 * 1500, 6 * 128 * 4112, 0),
            id="wide rows",
        ),
        pytest.param(
            SoftmaxSizes(0, 1, 16, 4, **WITH_GRADIENTS),
            Plan(1, 0, 32, 32, 1, 64, 64, True, 32, 32 * 16, 0),
            id="no rows",
        ),
        pytest.param(
            SoftmaxSizes(1, 1, 0, 4, **WITH_GRADIENTS),
            Plan(1, 1, 32, 32, 1, 64, 64, True, 32, 0, 0),
            id="no features",
        ),
    ],
)
def test_plan_computed_by_hand(planner, sizes, expected):
    assert planner(sizes).as_dict() == expected.as_dict()
