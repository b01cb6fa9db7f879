"""Batches by a budget of tokens, spread evenly over the ranks."""

import hashlib
import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Sampler

from stamp_kernels.data._integers import integers_of
from stamp_kernels.ops._checks import check_count, check_range

if TYPE_CHECKING:
    import numpy as np


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Batches of as many sequences as a budget of tokens holds, every rank's about equally heavy.

    For `DataLoader(dataset, batch_sampler=...)`, with torch's conventions for distributed samplers: call `set_epoch`
    before every epoch, or all have the same order. Every rank makes the same plan, from the arguments, seed and epoch
    alone:

    1. The order of the sequences is a plain shuffle. Packed batches have no padding to save, so nothing is sorted or
       bucketed by length, and batches are as random as those of a shuffled loader with a fixed batch size.
    2. Chunks are cut from that order one after another, each about as long as fits all ranks together.
    3. A chunk's sequences are spread over the ranks, the longest first, each to the rank with the fewest tokens so far.
       If a rank's budget does not hold them, the chunk's last sequences are left to the next chunk.

    So the tokens of any two ranks in a step differ by no more than the shortest sequence on the heavier one, unless
    max_sequences stands in the way. Their numbers of sequences may differ more, so a mean over each rank's own would
    not weigh all sequences alike: normalise losses by the counts of all ranks (for T5, `global_target_counts`).

    Every rank gets the same number of batches, and without drop_last every index comes once an epoch. Where the last
    chunk has fewer sequences than there are ranks, some ranks get an empty list (PackingCollator makes an empty batch
    of it); every other batch has at least one sequence. Within a batch the sequences stand in the epoch's order.

    The batches are already those of one rank: a wrapper that shards them again (Accelerate's `prepare` on several
    ranks) must be kept off the loader.

    Args:
        lengths: integers of at least 0, the tokens of each sequence of the dataset, the same on every rank. An empty
            sequence takes nothing of the budget; where there may be many, max_sequences bounds a batch.
        max_tokens: the most tokens of a batch, on each rank.
        num_replicas: the number of ranks. None: that of torch.distributed where it is initialised, else 1.
        rank: None: that of torch.distributed where it is initialised, else 0.
        shuffle: False: the order of the dataset, in every epoch.
        seed: of the shuffle, the same on every rank.
        drop_last: leave out the last chunk if it is not full: if a rank would have held the shortest of all sequences
            besides.
        max_sequences: the most sequences of a batch, on each rank. None: any number.

    Raises:
        ValueError: an argument is out of range, or a sequence is longer than max_tokens.
    """

    def __init__(
        self,
        lengths: "Sequence[int] | np.ndarray | Tensor",
        max_tokens: int,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        max_sequences: int | None = None,
    ) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if num_replicas is None:
            num_replicas = torch.distributed.get_world_size() if distributed else 1
        if rank is None:
            rank = torch.distributed.get_rank() if distributed else 0
        check_count("max_tokens", max_tokens, 1)
        check_count("num_replicas", num_replicas, 1)
        check_count("rank", rank)
        check_range("rank", rank, 0, num_replicas, below_high=True)
        check_count("seed", seed)
        if max_sequences is not None:
            check_count("max_sequences", max_sequences, 1)
        self._lengths = integers_of("lengths", lengths)
        _check_lengths(self._lengths, max_tokens)
        self.max_tokens = max_tokens
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.max_sequences = max_sequences
        self._epoch_and_first_batch = (0, 0)
        self._planned_epoch: int | None = None
        self._batches: list[list[int]] = []

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch of the next iterations.

        Args:
            epoch: at least 0.
            first_batch: how many of its batches to leave out, to go on in the middle of an epoch without loading what
                was seen: the number of batches each rank has had, under the same arguments, ranks included. It holds
                until an iteration has come to its end; the next one starts at batch 0.

        Raises:
            ValueError: epoch is not an int of at least 0, or first_batch not one of 0 to the epoch's number of batches.
        """
        check_count("epoch", epoch)
        check_count("first_batch", first_batch)
        if first_batch > 0:  # Otherwise there is no need to plan yet.
            check_range("first_batch", first_batch, 0, len(self._planned(epoch)))
        self._epoch_and_first_batch = (epoch, first_batch)

    def __len__(self) -> int:
        """The exact number of batches of an iteration that begins now: the epoch's, less first_batch of `set_epoch`."""
        epoch, first_batch = self._epoch_and_first_batch
        return len(self._planned(epoch)) - first_batch

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of the sequences of this rank's batches, in the epoch chosen when the first one is asked for."""
        chosen = self._epoch_and_first_batch
        epoch, first_batch = chosen
        batches = self._planned(epoch)
        for index in range(first_batch, len(batches)):
            yield list(batches[index])
        # A loader that reads ahead may get here after the next set_epoch, which then holds.
        if self._epoch_and_first_batch is chosen:
            self._epoch_and_first_batch = (epoch, 0)

    def _planned(self, epoch: int) -> list[list[int]]:
        """This rank's batches of an epoch; the last plan is kept."""
        if not self.shuffle:
            epoch = 0
        if self._planned_epoch != epoch:
            self._batches = self._plan(self._order(epoch))
            self._planned_epoch = epoch
        return self._batches

    def _order(self, epoch: int) -> Tensor:
        """int64 `[N]`, a permutation."""
        if not self.shuffle:
            return torch.arange(len(self._lengths))
        # Hashed, so that seed 0 in epoch 1 is not seed 1 in epoch 0. The generator uses 32 bits of its seed.
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        return torch.randperm(len(self._lengths), generator=generator)

    def _plan(self, order: Tensor) -> list[list[int]]:
        lengths = self._lengths[order]
        tokens_before = [0, *lengths.cumsum(0).tolist()]
        lengths, order = lengths.tolist(), order.tolist()
        shortest = min(lengths, default=0)
        batches = []
        first = 0
        while first < len(order):
            end = bisect_right(tokens_before, tokens_before[first] + self.num_replicas * self.max_tokens) - 1
            if self.max_sequences is not None:
                end = min(end, first + self.num_replicas * self.max_sequences)
            rank_of = self._spread_as_many_as_fit(lengths[first:end])
            end = first + len(rank_of)
            if self.drop_last and end == len(order) and self._has_room(lengths[first:end], rank_of, shortest):
                break
            mine = self.rank
            batches.append([order[first + i] for i, rank in enumerate(rank_of) if rank == mine])
            first = end
        return batches

    def _spread_as_many_as_fit(self, lengths: list[int]) -> list[int]:
        """The rank of each of the first sequences of a chunk, as many of them as a search finds to fit."""
        longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)  # Stable: ties are in order.
        # As many sequences as ranks always fit. Rarely more than a few are too many, so search from the far end, in
        # growing steps, and then between the last two.
        count, too_many, step = len(lengths), len(lengths) + 1, 1
        while (rank_of := self._spread(lengths, longest_first, count)) is None:
            too_many = count
            count = max(count - step, self.num_replicas)
            step *= 2
        while too_many - count > 1:
            middle = (count + too_many) // 2
            attempt = self._spread(lengths, longest_first, middle)
            if attempt is None:
                too_many = middle
            else:
                count, rank_of = middle, attempt
        return rank_of

    def _spread(self, lengths: list[int], longest_first: list[int], count: int) -> list[int] | None:
        """The rank of each of the first `count` sequences of a chunk; None where that is beyond a budget."""
        max_tokens, max_sequences = self.max_tokens, self.max_sequences
        # Ranks by tokens; at a tie by sequences, so that empty sequences are spread too.
        ranks = [(0, 0, rank) for rank in range(self.num_replicas)]
        rank_of = [0] * count
        for i in longest_first:
            if i >= count:
                continue
            tokens, sequences, rank = ranks[0]
            tokens += lengths[i]
            sequences += 1
            if tokens > max_tokens:
                return None
            rank_of[i] = rank
            if sequences == max_sequences:
                heapq.heappop(ranks)  # The chunk has at most max_sequences for each rank, so this one was not the last.
            else:
                heapq.heapreplace(ranks, (tokens, sequences, rank))
        return rank_of

    def _has_room(self, lengths: list[int], rank_of: list[int], length: int) -> bool:
        """Whether some rank could hold a sequence of that length besides."""
        tokens, sequences = [0] * self.num_replicas, [0] * self.num_replicas
        for rank, n in zip(rank_of, lengths, strict=True):
            tokens[rank] += n
            sequences[rank] += 1
        return any(
            t + length <= self.max_tokens and (self.max_sequences is None or s < self.max_sequences)
            for t, s in zip(tokens, sequences, strict=True)
        )


def _check_lengths(lengths: Tensor, max_tokens: int) -> None:
    if len(lengths) == 0:
        return
    shortest, longest = int(lengths.argmin()), int(lengths.argmax())
    if lengths[shortest] < 0:
        raise ValueError(f"lengths must be at least 0, got {int(lengths[shortest])} at index {shortest}")
    if lengths[longest] > max_tokens:
        raise ValueError(
            f"lengths must be at most max_tokens, {max_tokens}, got {int(lengths[longest])} at index {longest}: cut "
            "that sequence, or raise max_tokens"
        )
