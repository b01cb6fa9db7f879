"""What the launchers of the cross-entropy prepare: row chunks, lists of rows, vectors, step weights, products."""

import itertools

import pytest
import torch
from test_triton_cross_entropy import DEVICE, LAYOUTS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpreterBuilder

from stamp_kernels.common.arguments import LossNeeds, LossOptions, StepWeights
from stamp_kernels.triton_kernels.aot import TARGETS
from stamp_kernels.triton_kernels.cross_entropy import chunked, configs, row_lists
from stamp_kernels.triton_kernels.cross_entropy import multi_token_cross_entropy as launchers
from stamp_kernels.triton_kernels.cross_entropy.row_lists import list_rows
from stamp_kernels.triton_kernels.cross_entropy.softmaxes import Softmaxes, rows_of_vectors, softmaxes_of


@pytest.mark.parametrize("properties", TARGETS.values(), ids=[f"sm_{arch}" for arch in TARGETS])
def test_no_two_warps_compute_the_same_rows(properties):
    """In the machine code, `warpsPerCTA` of each product says how the compiler divides a tile; this is its rule.

    A warp has 16 rows. With wgmma and a product that follows, all warps divide the rows; so they do with mma.sync if a
    tile is not wider than high. tcgen05 has one thread that issues the products.
    """
    major, _ = properties.capability
    for width in (8, 16, 24, 32, 64, 72, 100, 128, 136, 200, 256, 264, 512, 1024, 4096):
        tiles = []  # rows of the product, its columns or those of the next one, warps
        forward = configs.forward_config(properties, width, element_size=2)
        tiles.append((forward.block_n, forward.block_v, forward.num_warps))
        for has_one_softmax in (False, True):
            hidden = configs.hidden_gradient_config(properties, width, element_size=2, has_one_softmax=has_one_softmax)
            tiles.append((hidden.block_n, hidden.block_d, hidden.num_warps))
        for has_bias, has_ranges in itertools.product((False, True), repeat=2):
            weight = configs.weight_gradient_config(
                properties, width, element_size=2, has_bias=has_bias, has_ranges=has_ranges
            )
            tiles.append((weight.block_v, weight.block_d, weight.num_warps))
        for rows, columns, num_warps in tiles:
            if major == 9 or (major != 10 and columns <= rows):
                assert 16 * num_warps <= rows, (width, rows, columns, num_warps)
            assert num_warps in (4, 8)


@pytest.mark.parametrize("num_rows", [1, 64, 1000, 2048, 5000, 100_000])
@pytest.mark.parametrize("num_classes", [16, 256, 4096, 152_960, 262_144, 10_000_000])
@pytest.mark.parametrize("element_size", [2, 4])
def test_row_chunks_are_sized_by_memory(num_rows, num_classes, element_size):
    row_bytes = element_size * num_classes
    rows = configs.row_chunk_size(num_rows, row_bytes)
    assert rows % 64 == 0 and 64 <= rows < num_rows + 64
    assert rows == 64 or rows * row_bytes <= 2**30
    # Whole logits are in memory only if they are few.
    assert rows == 64 or rows * row_bytes <= 320 * 2**20 or rows <= num_rows / 2 + 64
    # Few chunks read and write the gradient of the weight.
    assert rows >= min(2048, num_rows / 2 - 64, 2**30 / row_bytes - 64)
    # Not the logits of many rows, though the vocabulary is small
    assert rows <= max(2048, num_rows / 8 + 64)


@pytest.mark.parametrize(
    ("num_rows", "row_bytes", "expected"),
    [
        pytest.param(16_384, 2 * 152_960, 2048, id="598 MiB"),
        pytest.param(16_384, 4 * 152_960, 1728, id="1 GiB"),
        pytest.param(16_384, 2 * 262_144, 2048, id="1 GiB, the largest vocabulary"),
        pytest.param(2048, 2 * 152_960, 1088, id="half of the rows, or 320 MiB"),
        pytest.param(1000, 2 * 152_960, 1024, id="all rows in 320 MiB"),
        pytest.param(32_768, 2 * 32_000, 4096, id="an eighth of the rows"),
        pytest.param(65_536, 2 * 32_000, 5184, id="320 MiB"),
        pytest.param(65_536, 2 * 1024, 8192, id="small vocabulary"),
    ],
)
def test_row_chunks_computed_by_hand(num_rows, row_bytes, expected):
    assert configs.row_chunk_size(num_rows, row_bytes) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logits_of_row_chunks_in_memory(monkeypatch, dtype):
    """In the dtype of the hidden states; rows of any number of classes begin on 32-byte boundaries."""
    logits = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.out:
                logits.append(kwargs["out"])
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(chunked, "row_chunk_size", lambda *_: 64)
    hidden, weight, targets = torch.randn(100, 8), torch.randn(50, 8), torch.zeros(100, 1, dtype=torch.int64)
    softmaxes = softmaxes_of(*(x.to(DEVICE) for x in (hidden.to(dtype), weight.to(dtype), targets)), None, [(0, 50)])
    scale, options = torch.ones(1, device=DEVICE), LossOptions(None, -100, 0.0, 0.0, None)
    with Record():
        chunked.with_gradients(softmaxes, scale, options, LossNeeds(False, False, False))
    assert [x.shape for x in logits] == [(64, 50), (36, 50)]
    assert len({x.untyped_storage().data_ptr() for x in logits}) == 1
    assert all(x.dtype == dtype and x.stride() == (64, 1) for x in logits)


PATTERNS = {
    "none": lambda row: row < 0,
    "all": lambda row: row >= 0,
    "prefix": lambda row: row < 1300,
    "suffix": lambda row: row >= 1300,
    "every other": lambda row: row % 2 == 0,
    "blocks": lambda row: row // 100 % 2 == 0,
    "but one": lambda row: row != 1777,
}


def softmaxes_of_targets(targets: Tensor, shares_hidden: bool) -> Softmaxes:
    num_rows, num_steps = targets.shape
    hidden, weight = torch.zeros(num_steps, num_rows, 4), torch.zeros(3, 4)
    if shares_hidden:
        hidden = hidden[0]
    return softmaxes_of(hidden.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE), None, [(0, 3)] * num_steps)


@pytest.mark.parametrize("shares_hidden", [False, True], ids=["hidden per step", "shared hidden"])
@pytest.mark.parametrize("rows_per_block", [64, 512, 4096], ids="{} rows a block".format)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_lists_of_rows(monkeypatch, pattern, rows_per_block, shares_hidden):
    """One block, several, and more blocks than a program adds up counts at a time."""
    monkeypatch.setattr(row_lists, "_ROWS_PER_BLOCK", rows_per_block)
    num_rows = 4500 if rows_per_block == 64 else 2500
    rows = torch.arange(num_rows)
    targets = torch.zeros(num_rows, 2, dtype=torch.int64)
    targets[PATTERNS[pattern](rows), 0] = -1
    targets[rows % 5 != 0, 1] = -1
    lists = list_rows(softmaxes_of_targets(targets, shares_hidden), -1)
    is_valid = targets != -1
    for hidden, valid in enumerate([is_valid.any(1)] if shares_hidden else is_valid.unbind(1)):
        length = int(lists.lengths[hidden])
        got = lists.rows[hidden].cpu()
        assert torch.equal(got[:length], rows[valid].int())
        assert torch.equal(got[length:].sort().values, rows[~valid].int())


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels are compiled, not interpreted")
@pytest.mark.parametrize("shares_hidden", [False, True], ids=["hidden per step", "shared hidden"])
@pytest.mark.parametrize("num_rows", [16, 320])
def test_lists_read_every_target_at_most_twice(monkeypatch, num_rows, shares_hidden):
    """A list costs as many reads as it has rows; one block needs no counts of others."""
    monkeypatch.setattr(row_lists, "_ROWS_PER_BLOCK", 16)
    load = InterpreterBuilder.create_masked_load
    num_read = 0

    def counting(self, ptrs, mask, *others):
        nonlocal num_read
        if ptrs.get_element_ty().primitive_bitwidth == 64:
            num_read += int(mask.data.sum())
        return load(self, ptrs, mask, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting)
    list_rows(softmaxes_of_targets(torch.zeros(num_rows, 3, dtype=torch.int64), shares_hidden), -1)
    assert num_read == 3 * num_rows * (1 if num_rows == 16 else 2)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("width", [1, 17, 24, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_become_vectors_of_16_bytes(dtype, width, name):
    x = torch.randn(3, 5, width).to(dtype)
    placed = LAYOUTS[name](x)
    rows = rows_of_vectors(placed)
    vector = 16 // x.element_size()
    assert torch.equal(rows[..., :width], x) and not rows[..., width:].any() and rows.shape[-1] % vector == 0
    assert rows.stride(-1) == 1 and rows.data_ptr() % 16 == 0
    assert all(stride % vector == 0 for stride in rows.stride()[:-1])
    is_aligned = all(stride % vector == 0 for stride in placed.stride()[:-1]) and placed.data_ptr() % 16 == 0
    assert (rows is placed) == (is_aligned and placed.stride(-1) == 1 and width % vector == 0)


@pytest.mark.parametrize("step_weights", [[0.5], [1.0, 1.0, 1.0], [1.0, 0.5, 0.5, 0.25], [2, 1]])
def test_step_weights_are_written_on_the_device(step_weights):
    """A copy from the CPU would wait for the device, and in a CUDA graph lose its source."""
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    with Record():
        weights = launchers._weights_on_device(StepWeights(step_weights, None), torch.device(DEVICE))
    assert weights.tolist() == step_weights and weights.dtype == torch.float32
    assert set(called) <= {torch.ops.aten.empty, torch.ops.aten.slice, torch.ops.aten.fill_}
    assert called.count(torch.ops.aten.fill_) == len(dict.fromkeys(step_weights))


@pytest.mark.parametrize("add", [False, True])
def test_half_precision_products_reach_the_right_overload(add):
    """It runs only on a GPU. This test shows that torch accepts these arguments."""
    reached = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            reached.append((func, args, kwargs))
            return kwargs["out"]

    a, b, out = torch.ones(4, 8).bfloat16(), torch.ones(8, 6).bfloat16(), torch.ones(4, 6)
    with Record():
        chunked._set_product(out, a, b, add=add)
    ((func, args, kwargs),) = reached
    assert func is torch.ops.aten.addmm.dtype_out
    assert [x is y for x, y in zip(args, (out, a, b, torch.float32), strict=True)] == [True] * 4
    assert kwargs.pop("out") is out and kwargs.get("beta", 1) == int(add) and set(kwargs) <= {"beta"}
