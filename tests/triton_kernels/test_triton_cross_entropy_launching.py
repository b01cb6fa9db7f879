"""What the launchers of the cross-entropy prepare: row chunks, lists of rows, vectors, step weights, products."""

import pytest
import torch
from test_triton_cross_entropy import DEVICE, LAYOUTS
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from stamp_kernels.common.arguments import StepWeights
from stamp_kernels.triton_kernels.cross_entropy import chunked, configs, row_lists
from stamp_kernels.triton_kernels.cross_entropy import multi_token_cross_entropy as launchers
from stamp_kernels.triton_kernels.cross_entropy.row_lists import list_rows
from stamp_kernels.triton_kernels.cross_entropy.softmaxes import rows_of_vectors, softmaxes_of


@pytest.mark.parametrize("num_rows", [1, 64, 1000, 5000, 100_000])
@pytest.mark.parametrize("num_classes", [1, 256, 4096, 152_960, 10_000_000])
def test_row_chunks_are_sized_by_memory(num_rows, num_classes):
    rows = configs.row_chunk_size(num_rows, num_classes)
    assert rows % 64 == 0 and rows >= 64
    assert rows == 64 or 4 * rows * num_classes <= configs.CHUNK_BYTES
    assert rows < num_rows + 64
    # A small vocabulary has several chunks too
    assert num_rows < 10_000 or rows <= num_rows / 7


@pytest.mark.parametrize("pattern", ["none", "all", "prefix", "suffix", "every other", "blocks", "but one"])
def test_lists_of_rows(monkeypatch, pattern):
    monkeypatch.setattr(row_lists, "_ROWS_PER_PROGRAM", 512)
    num_rows = 2500
    rows = torch.arange(num_rows)
    ignored = {
        "none": rows < 0,
        "all": rows >= 0,
        "prefix": rows < 1300,
        "suffix": rows >= 1300,
        "every other": rows % 2 == 0,
        "blocks": rows // 100 % 2 == 0,
        "but one": rows != 1777,
    }[pattern]
    targets = torch.zeros(num_rows, 2, dtype=torch.int64)
    targets[ignored, 0] = -1
    targets[rows % 5 != 0, 1] = -1
    hidden, weight = torch.zeros(2, num_rows, 4), torch.zeros(3, 4)
    for shared in (False, True):
        of_steps = softmaxes_of(
            (hidden[0] if shared else hidden).to(DEVICE), weight.to(DEVICE), targets.to(DEVICE), None, [(0, 3)] * 2
        )
        lists = list_rows(of_steps, -1)
        is_valid = targets != -1
        for of_hidden, valid in enumerate([is_valid.any(1)] if shared else is_valid.unbind(1)):
            length = int(lists.lengths[of_hidden])
            got = lists.rows[of_hidden].cpu()
            assert torch.equal(got[:length], rows[valid].int())
            assert torch.equal(got[length:].sort().values, rows[~valid].int())


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
