"""The training steps of the T5 recommender on `meta` tensors: which kernels they launch, without a GPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import Workload, offsets

from stamp_kernels import PackedBatch
from stamp_kernels.profiling.data.batches import Batch
from stamp_kernels.profiling.recommender.recommender import RecommenderSettings, build_recommender

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class _Bfloat16Products(TorchDispatchMode):
    """What autocast does to matrix products, for `meta` tensors, which torch's own autocast passes by."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS:
            args = [x.to(torch.bfloat16) if isinstance(x, Tensor) else x for x in args]
        return func(*args, **(kwargs or {}))


@contextmanager
def bfloat16_autocast_on_meta() -> Iterator[None]:
    """Products in bfloat16, and the ops of this package, which ask whether a GPU's autocast is on."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with _Bfloat16Products():
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@dataclass(frozen=True)
class TrainingStep(Workload):
    """Forward and backward of a configuration of `stamp-profile train`, under bfloat16 autocast. For `meta` alone.

    Attributes:
        configuration: its name.
        items: of each history.
    """

    configuration: str = ""
    items: tuple[int, ...] = ()

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        return {}

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        sizes = RecommenderSettings()
        recommender = build_recommender(self.configuration, sizes, seed=0).to("meta").train()
        with bfloat16_autocast_on_meta(), torch.autograd.set_multithreading_enabled(False):
            recommender(self._batch(sizes)).loss.backward()
        return {}

    def _batch(self, sizes: RecommenderSettings) -> Batch:
        meta = torch.device("meta")
        lengths = torch.tensor(self.items) * sizes.codes_per_item
        batch, longest = len(self.items), int(lengths.max())

        def tokens(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=meta)

        return Batch(
            packed_inputs=PackedBatch(
                tokens(int(lengths.sum())), offsets(lengths.tolist(), meta), longest, lengths_cpu=lengths
            ),
            input_ids=tokens(batch, longest),
            attention_mask=tokens(batch, longest),
            labels=tokens(batch, sizes.codes_per_item),
            future_ids=tokens(batch, sizes.auxiliary_steps * sizes.codes_per_item),
        )

    def work(self, element_size: int) -> Any:
        raise ValueError(f"{self.name}: a training step has no floor of its own")


# Histories as `stamp-profile train` cuts them, at most 30 items, and long ones; batches of 256 and of 2,048.
TRAINING_STEPS = tuple(
    TrainingStep(f"T5.{configuration}.{most}x{batch}", configuration=configuration, items=(most, *[5] * (batch - 1)))
    for most in (30, 250)
    for batch in (256, 2048)
    for configuration in ("packed", "packed+sap", "packed+sap+map")
)
