"""What the ranks of test_t5_distributed.py run: training a stamped T5 in several ways. Rank 0 writes the results.

python -m torch.distributed.run --standalone --nproc-per-node 2 t5_distributed_worker.py <directory> <scenario> ...
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from t5_cases import LEVELS, VOCAB_SIZE, tiny_t5
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from stamp_kernels.data import PackingCollator, TokenBudgetBatchSampler
from stamp_kernels.integrations.transformers import PredictionConfig, PruningConfig, apply_stamp, global_target_counts
from stamp_kernels.modules.prediction import LinearDecay

TIMEOUT = timedelta(seconds=60)
NUM_STEPS = 3
CODEBOOK_SIZE = (VOCAB_SIZE - 1) // LEVELS
PRUNING = PruningConfig(schedule=((1, 0.6), (2, 0.5)), protect_last=1)

# The lengths of the histories on each rank, one row per batch. The ranks have different numbers of sequences and
# tokens, in both orders. Each rank has no sequence once, as the sampler's last batch may have. Users of length 5 have
# no label and no later item, so the last row has no target.
LENGTHS_OF_RANKS = (
    ((7, 200, 1), (30, 2, 13, 0, 5)),
    ((12, 40), ()),
    ((), (3, 24, 9)),
    ((5, 4, 60, 8, 11), (90,)),
    ((5, 5), (5,)),
)

# Lengths for the sampler: from a few tokens to many, and one sequence left over at the end.
SAMPLER_LENGTHS = [1 + (37 * i) % 50 for i in range(61)]
SAMPLER_BUDGET = 64


@dataclass(frozen=True)
class Scenario:
    """One way to train.

    Attributes:
        parallel: how the model is distributed over the ranks, see `PARALLEL`.
        rows: the batches, from LENGTHS_OF_RANKS, in the order of training.
        micro_batches: how many batches are accumulated for one optimizer step.
        checkpointing: whether blocks are recomputed in the backward.
        own_unembedding: transformer heads with an unembedding of their own, a decaying lambda, and a base model without
            tied embeddings. False: residual heads on the base model's unembedding.
    """

    parallel: str
    rows: tuple[int, ...] = (0, 1, 2, 3)
    micro_batches: int = 1
    checkpointing: bool = False
    own_unembedding: bool = False

    @property
    def prediction(self) -> PredictionConfig:
        firsts = range(1, VOCAB_SIZE, CODEBOOK_SIZE)
        ranges = [(first, first + CODEBOOK_SIZE) for first in firsts]
        if not self.own_unembedding:
            return PredictionConfig(num_steps=NUM_STEPS, codes_per_item=LEVELS, vocab_ranges=ranges)
        return PredictionConfig(
            num_steps=NUM_STEPS,
            codes_per_item=LEVELS,
            head="transformer",
            num_attention_heads=3,
            unembedding="own",
            step_weights=(1.0, 0.5, 0.25),
            lambda_=LinearDecay(0.4, 0.1, 3),
        )

    def build_model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        model = tiny_t5(dtype, **({"tie_word_embeddings": False} if self.own_unembedding else {}))
        return apply_stamp(model, pruning=PRUNING, prediction=self.prediction)

    def steps(self) -> list[tuple[int, ...]]:
        """The rows of each optimizer step."""
        firsts = range(0, len(self.rows), self.micro_batches)
        return [self.rows[first : first + self.micro_batches] for first in firsts]


SCENARIOS = {
    "ddp": Scenario("ddp"),
    "ddp-checkpointing": Scenario("ddp", checkpointing=True),
    "ddp-no-targets": Scenario("ddp", rows=(0, 4, 3)),
    "ddp-accumulated": Scenario("ddp", micro_batches=2),
    "ddp-own-unembedding": Scenario("ddp", own_unembedding=True),
    "fsdp2-whole": Scenario("fsdp2-whole"),
    "fsdp2-blocks": Scenario("fsdp2-blocks"),
    "fsdp2-blocks-checkpointing": Scenario("fsdp2-blocks", checkpointing=True),
    "fsdp2-blocks-accumulated": Scenario("fsdp2-blocks", micro_batches=2),
    "fsdp2-blocks-and-heads": Scenario("fsdp2-blocks-and-heads", own_unembedding=True),
}


def features(lengths: Iterable[int], seed: int) -> list[dict[str, list[int]]]:
    """Random users with histories of these lengths, one item as labels, and up to 4 later items."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(num_items: int) -> list[int]:
        codes = torch.randint(CODEBOOK_SIZE, (num_items, LEVELS), generator=generator)
        return (codes + 1 + torch.arange(LEVELS) * CODEBOOK_SIZE).flatten().tolist()

    return [
        {
            "input_ids": tokens(length // LEVELS + 1)[:length],
            "labels": [-100] * LEVELS if length == 5 else tokens(1),
            "future_ids": tokens(length % 5),
        }
        for length in lengths
    ]


def batch_of_rank(row: int, rank: int) -> dict[str, Any]:
    collate = PackingCollator(future_length=NUM_STEPS * LEVELS)
    batch = collate(features(LENGTHS_OF_RANKS[row][rank], seed=10 * row + rank))
    if row == 1 and rank == 1:
        assert batch["labels"].shape == (0, 0)
        batch["labels"] = batch["labels"].new_empty(0, LEVELS)  # the other shape of no labels
    return batch


def global_batch(rows: Iterable[int]) -> dict[str, Any]:
    """The batches of all ranks in these rows, as one batch."""
    together = [
        features(lengths, seed=10 * row + rank) for row in rows for rank, lengths in enumerate(LENGTHS_OF_RANKS[row])
    ]
    return PackingCollator(future_length=NUM_STEPS * LEVELS)(list(itertools.chain(*together)))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


@dataclass
class Trajectory:
    """The result of training: loss and gradients of each optimizer step, and the final parameters."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def shard_blocks(model: nn.Module) -> nn.Module:
    for block in (*model.encoder.block, *model.decoder.block):
        fully_shard(block, reshard_after_forward=True)
    return fully_shard(model)


def shard_blocks_and_heads(model: nn.Module) -> nn.Module:
    fully_shard(model.stamp_prediction, reshard_after_forward=True)
    return shard_blocks(model)


PARALLEL: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "fsdp2-whole": fully_shard,
    "fsdp2-blocks": shard_blocks,
    "fsdp2-blocks-and-heads": shard_blocks_and_heads,
}


@contextlib.contextmanager
def gradient_sync(model: nn.Module, enabled: bool):
    """Whether a backward inside averages the gradients over the ranks."""
    if isinstance(model, DistributedDataParallel):
        with contextlib.nullcontext() if enabled else model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(enabled)
        yield


def train(scenario: Scenario) -> Trajectory:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    bare = scenario.build_model()
    if scenario.checkpointing:
        bare.gradient_checkpointing_enable({"use_reentrant": False})
    model = PARALLEL[scenario.parallel](bare)
    optimizer = make_optimizer(bare)
    trajectory = Trajectory()
    for step, rows in enumerate(scenario.steps()):
        batches = [batch_of_rank(row, rank) for row in rows]
        counts = [global_target_counts(b["labels"], b["future_ids"], scenario.prediction) for b in batches]
        counts = {name: sum(count[name] for count in counts) for name in counts[0]}
        total = torch.zeros((), dtype=torch.float64)
        for number, batch in enumerate(batches, start=1):
            with gradient_sync(model, number == len(batches)):
                loss = model(**batch, **counts, training_step=step).loss
                (loss * world_size).backward()
            total += loss.detach()
        dist.all_reduce(total)
        trajectory.losses.append(total)
        gradients = {name: whole(p.grad) for name, p in bare.named_parameters() if p.grad is not None}
        trajectory.gradients.append(gradients)
        optimizer.step()
        optimizer.zero_grad()
    trajectory.parameters = {name: whole(p) for name, p in bare.named_parameters()}
    return trajectory


def losses_in_bfloat16() -> list[Tensor]:
    """FSDP2's own mixed precision, which casts everything that blocks receive to bfloat16, even bias tables."""
    scenario = SCENARIOS["fsdp2-blocks"]
    model = scenario.build_model(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in (*model.encoder.block, *model.decoder.block):
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = make_optimizer(model)
    losses = []
    for rows in scenario.steps():
        (batch,) = (batch_of_rank(row, dist.get_rank()) for row in rows)
        loss = model(**batch, **global_target_counts(batch["labels"], batch["future_ids"], scenario.prediction)).loss
        (loss * dist.get_world_size()).backward()
        total = loss.detach().double()
        dist.all_reduce(total)
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def sampled_batches() -> dict[str, list[list[list[int]]]]:
    """By iteration, each rank's batches."""
    sampler = TokenBudgetBatchSampler(SAMPLER_LENGTHS, SAMPLER_BUDGET)
    assert (sampler.num_replicas, sampler.rank) == (dist.get_world_size(), dist.get_rank())
    result = {}
    for name, arguments in {"epoch 0": (0,), "epoch 1": (1,), "epoch 1 from batch 3": (1, 3)}.items():
        sampler.set_epoch(*arguments)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, list(sampler))
        result[name] = ranks
    return result


def main() -> None:
    torch.set_num_threads(1)
    # As in conftest.py: unwritten memory is NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    directory, *names = sys.argv[1:]
    dist.init_process_group("gloo", timeout=TIMEOUT)
    for name in names:
        if name == "bfloat16":
            result = losses_in_bfloat16()
        elif name == "sampler":
            result = sampled_batches()
        else:
            result = vars(train(SCENARIOS[name]))
        if dist.get_rank() == 0:
            torch.save(result, Path(directory) / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
