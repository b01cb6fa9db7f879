"""Train a small T5 recommender with STAMP: packed sequences, pruned histories (SAP), several items predicted (MAP).

    pip install "stamp_kernels[profile]" && pip install --no-deps recbole  # recbole contains MovieLens-100K
    python examples/train_t5.py
    torchrun --nproc-per-node 8 examples/train_t5.py --parallel fsdp2 --bf16 --compile --checkpoint run.pt

The last command continues from the checkpoint if there is one. Another number of processes may have written it: the
epoch then continues after the same number of batches, although those had other sequences.
"""

import argparse
import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import T5Config, T5ForConditionalGeneration

from stamp_kernels.data import PackingCollator, TokenBudgetBatchSampler
from stamp_kernels.integrations.transformers import PredictionConfig, PruningConfig, apply_stamp, global_target_counts
from stamp_kernels.profiling.data.interactions import load_interactions
from stamp_kernels.profiling.data.rows import TrainingRows
from stamp_kernels.profiling.data.semantic_ids import assign_semantic_ids
from stamp_kernels.profiling.data.vocabulary import Vocabulary


class NextItems(Dataset):
    """Users' histories as semantic-ID tokens, the next item, and the items after it: features for PackingCollator."""

    def __init__(self, path: str | None, max_items: int) -> None:
        interactions = load_interactions(path)
        semantic_ids = interactions.semantic_ids
        if semantic_ids is None:
            semantic_ids = assign_semantic_ids(interactions)
        self.vocabulary = Vocabulary(codes_per_item=semantic_ids.shape[1], codebook_size=int(semantic_ids.max()) + 1)
        self.tokens_of_item = self.vocabulary.tokens(semantic_ids)  # [num_items, codes_per_item]
        self.rows = TrainingRows(interactions, max_items)
        self.lengths = (self.rows.target - self.rows.start) * self.vocabulary.codes_per_item

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Sequence[int]]:
        start, target, end = self.rows.start[index], self.rows.target[index], self.rows.end[index]
        parts = {"input_ids": (start, target), "labels": (target, target + 1), "future_ids": (target + 1, end)}
        return {name: self.tokens_of_item[self.rows.items[a:b]].reshape(-1) for name, (a, b) in parts.items()}


def build_model(vocabulary: Vocabulary, prediction: PredictionConfig, dropout: float) -> nn.Module:
    sizes = dict(d_model=128, d_kv=64, d_ff=1024, num_layers=4, num_heads=6, dropout_rate=dropout)
    tokens = dict(vocab_size=vocabulary.size, pad_token_id=0, decoder_start_token_id=0, eos_token_id=None)
    model = T5ForConditionalGeneration(T5Config(**sizes, **tokens))
    # A third of every history stays after block 2. Apply STAMP before the optimizer, DDP or FSDP2 see the parameters.
    return apply_stamp(model, pruning=PruningConfig(schedule=[(2, 1 / 3)]), prediction=prediction)


def parallelize(model: nn.Module, parallel: str, device: torch.device) -> nn.Module:
    if not dist.is_initialized():
        return model
    if parallel == "ddp":
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    for block in (*model.encoder.block, *model.decoder.block):
        fully_shard(block)
    return fully_shard(model)


def exchange_gradients(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
    """Let a backward pass average gradients over the ranks or not: once for all accumulated batches is enough."""
    if isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext() if enabled else model.no_sync()
    if dist.is_initialized():
        model.set_requires_gradient_sync(enabled)
    return contextlib.nullcontext()


def steps_from(
    progress: dict[str, int], loader: DataLoader, epochs: int, accumulate: int
) -> Iterator[tuple[list[dict[str, Any]], dict[str, int]]]:
    """For each remaining optimizer step, its batches and the progress after it."""
    step, first_batch = progress["step"], progress["batch"]
    for epoch in range(progress["epoch"], epochs):
        loader.batch_sampler.set_epoch(epoch, first_batch)
        batches = iter(loader)
        while batches_of_step := list(itertools.islice(batches, accumulate)):
            step += 1
            first_batch += len(batches_of_step)
            yield batches_of_step, {"step": step, "epoch": epoch, "batch": first_batch}
        first_batch = 0


def save_checkpoint(path: str, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, int]) -> None:
    # Rank 0 saves whole tensors under the plain model's names: any number of ranks, with DDP or FSDP2, can load them.
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save({"model": model_state, "optimizer": optimizer_state, "progress": progress}, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)  # if this is interrupted, one whole checkpoint remains


def load_checkpoint(path: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    checkpoint = torch.load(path, map_location="cpu", mmap=True)
    states = dict(model_state_dict=checkpoint["model"], optim_state_dict=checkpoint["optimizer"])
    set_state_dict(model, optimizer, **states, options=StateDictOptions(full_state_dict=True))
    return checkpoint["progress"]


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    dataset = NextItems(args.data, args.max_items)
    codes_per_item = dataset.vocabulary.codes_per_item
    ranges = [dataset.vocabulary.level_range(level) for level in range(codes_per_item)]
    prediction = PredictionConfig(num_steps=3, codes_per_item=codes_per_item, vocab_ranges=ranges)
    loader = DataLoader(
        dataset,
        batch_sampler=TokenBudgetBatchSampler(dataset.lengths, args.max_tokens, seed=args.seed),
        collate_fn=PackingCollator(future_length=prediction.num_steps * codes_per_item),
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
    )

    torch.manual_seed(args.seed)  # every rank starts from the same weights
    stamped = build_model(dataset.vocabulary, prediction, args.dropout).to(device).train()
    if args.compile:  # block by block: FSDP2 gathers and frees parameters between them
        for block in (*stamped.encoder.block, *stamped.decoder.block):
            block.compile(dynamic=True)
    model = parallelize(stamped, args.parallel, device)
    optimizer = torch.optim.AdamW(stamped.parameters(), lr=args.learning_rate)
    progress = {"step": 0, "epoch": 0, "batch": 0}
    if args.checkpoint and os.path.exists(args.checkpoint):
        progress = load_checkpoint(args.checkpoint, stamped, optimizer)

    steps = steps_from(progress, loader, args.epochs, args.accumulate)
    if args.steps is not None:
        steps = itertools.islice(steps, max(args.steps - progress["step"], 0))
    for batches, progress in steps:
        step = progress["step"]
        torch.manual_seed(step * world_size + rank)  # for dropout: a continued run draws the same numbers
        batches = [{key: x.to(device, non_blocking=True) for key, x in batch.items()} for batch in batches]
        # Ranks have different numbers of sequences. Divided by the numbers of targets on all ranks, their losses sum to
        # the loss of one large batch.
        counts = [global_target_counts(batch["labels"], batch["future_ids"], prediction) for batch in batches]
        counts = {name: sum(count[name] for count in counts) for name in counts[0]}
        loss = torch.zeros((), device=device)
        for number, batch in enumerate(batches, start=1):
            with exchange_gradients(model, number == len(batches)):
                with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                    loss_of_batch = model(**batch, **counts).loss
                (loss_of_batch * world_size).backward()  # DDP and FSDP2 average over the ranks
            loss += loss_of_batch.detach()
        norm = nn.utils.clip_grad_norm_(stamped.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

        if step % args.log_every == 0:
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if dist.is_initialized():
                dist.all_reduce(loss)
            if rank == 0:
                print(f"step {step} epoch {progress['epoch']} loss {loss:.6f} gradient norm {norm:.6f}", flush=True)
        if args.checkpoint and step % args.save_every == 0:
            save_checkpoint(args.checkpoint, stamped, optimizer, progress)
    if args.checkpoint:
        save_checkpoint(args.checkpoint, stamped, optimizer, progress)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="file of interactions, see load_interactions (default: MovieLens-100K)")
    parser.add_argument(
        "--max-items", type=int, default=30, help="the most items of a history; earlier items are cut off"
    )
    parser.add_argument("--max-tokens", type=int, default=8192, help="the most tokens in a batch of one process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, help="stop after this number of optimizer steps")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp", help="how several processes train")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=2, help="processes that load data")
    parser.add_argument("--checkpoint", help="file to write, and to continue from if it exists")
    parser.add_argument("--save-every", type=int, default=1000, help="in steps")
    parser.add_argument("--log-every", type=int, default=10, help="in steps")
    args = parser.parse_args(argv)

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(args, device)
    if dist.is_initialized():  # not after an error: it would wait for the others, which torchrun ends
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
