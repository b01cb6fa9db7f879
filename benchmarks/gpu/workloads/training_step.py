"""Training steps of the T5 recommender on `meta` tensors, to find the kernels that they launch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stamp_kernels import PackedBatch
from stamp_kernels.profiling.data.batches import Batch
from stamp_kernels.profiling.recommender.recommender import RecommenderSettings, build_recommender

from .base import Workload, offsets

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class _Bfloat16Products(TorchDispatchMode):
    """Casts the factors of matrix products, as autocast does. torch's own autocast ignores `meta` tensors."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS:
            args = [x.to(torch.bfloat16) if isinstance(x, Tensor) else x for x in args]
        return func(*args, **(kwargs or {}))


@contextmanager
def bfloat16_autocast_on_meta() -> Iterator[None]:
    """bfloat16 for matrix products, and for this package's ops, which ask whether the GPU's autocast is on."""
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
    """Forward and backward of a configuration of `stamp-profile train` under bfloat16 autocast; only on `meta`.

    Attributes:
        configuration: name of the configuration.
        items: number of items of each history.
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
        num_sequences, longest = len(self.items), int(lengths.max())

        def tokens(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=meta)

        return Batch(
            packed_inputs=PackedBatch(
                tokens(int(lengths.sum())), offsets(lengths.tolist(), meta), longest, lengths_cpu=lengths
            ),
            input_ids=tokens(num_sequences, longest),
            attention_mask=tokens(num_sequences, longest),
            labels=tokens(num_sequences, sizes.codes_per_item),
            future_ids=tokens(num_sequences, sizes.auxiliary_steps * sizes.codes_per_item),
        )

    def work(self, element_size: int) -> Any:
        raise ValueError(f"{self.name}: a training step has no floor of its own")


# Histories of at most 30 items, as `stamp-profile train` truncates them, and long ones. Batches of 256 and 2,048.
TRAINING_STEPS = tuple(
    TrainingStep(
        f"T5.{configuration}.{longest}x{batch_size}",
        configuration=configuration,
        items=(longest, *[5] * (batch_size - 1)),
    )
    for longest in (30, 250)
    for batch_size in (256, 2048)
    for configuration in ("packed", "packed+sap", "packed+sap+map")
)
