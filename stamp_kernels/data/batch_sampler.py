"""TokenBudgetBatchSampler: batches of a bounded number of tokens, spread evenly over the ranks."""

import hashlib
import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Sampler

from stamp_kernels.data._integers import integers_of
from stamp_kernels.ops._checks import check_count, check_range

if TYPE_CHECKING:
    import numpy as np

__all__ = ["TokenBudgetBatchSampler"]


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Batches of as many sequences as fit into max_tokens, with about as many tokens on every rank.

    For `DataLoader(dataset, batch_sampler=...)`, with torch's conventions for distributed samplers: call `set_epoch`
    before every epoch, or all epochs have the same order. Every rank makes the same plan, which depends only on the
    arguments, the seed and the epoch:

    1. The order of the sequences is a plain shuffle. Packed batches have no padding to save, so nothing is sorted or
       bucketed by length, and batches are as random as those of a shuffled loader with a fixed batch size.
    2. The order is split into consecutive chunks, each with about as many tokens as all ranks together may have.
    3. The sequences of a chunk are spread over the ranks, the longest first, each to the rank with the fewest tokens so
       far. If that exceeds max_tokens on a rank, the last sequences of the chunk move to the next chunk.

    So the tokens of any two ranks in a step differ by no more than the shortest sequence on the heavier rank, unless
    max_sequences prevents it. The numbers of sequences may differ more, so a mean over each rank's own sequences does
    not weight all sequences equally: divide losses by the counts of all ranks (`global_target_counts`).

    Every rank gets the same number of batches, and without drop_last every index comes once an epoch. If the last
    chunk has fewer sequences than there are ranks, some ranks get an empty list, from which PackingCollator makes an
    empty batch. Every other batch has at least one sequence. Within a batch the sequences are in the epoch's order.

    The batches are already those of one rank. Do not give the loader to a wrapper that shards batches again, such as
    Accelerate's `prepare` on several ranks.

    Args:
        lengths: integers of at least 0, the number of tokens of each sequence of the dataset, the same on every rank.
            An empty sequence uses none of max_tokens. If there may be many, bound the batches by max_sequences.
        max_tokens: the most tokens of a batch on each rank.
        num_replicas: the number of ranks. None: as in torch.distributed if that is initialized, else 1.
        rank: None: as in torch.distributed if that is initialized, else 0.
        shuffle: False: every epoch has the order of the dataset.
        seed: of the shuffle, the same on every rank.
        drop_last: leave out the last chunk if it is not full, that is if the shortest of all sequences would still have
            fitted on a rank.
        max_sequences: the most sequences of a batch on each rank. None: any number.

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
        self.max_tokens = check_count("max_tokens", max_tokens, 1)
        self.num_replicas = check_count("num_replicas", num_replicas, 1)
        self.rank = check_count("rank", rank)
        check_range("rank", self.rank, 0, self.num_replicas, below_high=True)
        self.shuffle = shuffle
        self.seed = check_count("seed", seed)
        self.drop_last = drop_last
        self.max_sequences = None if max_sequences is None else check_count("max_sequences", max_sequences, 1)
        self._lengths = integers_of("lengths", lengths)
        _check_lengths(self._lengths, self.max_tokens)
        self._epoch_and_first_batch = (0, 0)
        self._planned_epoch: int | None = None
        self._batches: list[list[int]] = []

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch of the next iterations.

        Args:
            epoch: at least 0.
            first_batch: how many of its batches to skip, in order to continue within an epoch without loading the
                batches before: the number of batches that each rank has had with the same arguments, num_replicas
                included. It holds until an iteration has ended. The next iteration starts at batch 0.

        Raises:
            ValueError: epoch is not an int of at least 0, or first_batch is not an int from 0 to the epoch's number of
                batches.
        """
        epoch = check_count("epoch", epoch)
        first_batch = check_count("first_batch", first_batch)
        if first_batch > 0:  # Otherwise the plan is not needed yet.
            check_range("first_batch", first_batch, 0, len(self._planned(epoch)))
        self._epoch_and_first_batch = (epoch, first_batch)

    def __len__(self) -> int:
        """The exact number of batches of an iteration that begins now: those of the epoch minus first_batch."""
        epoch, first_batch = self._epoch_and_first_batch
        return len(self._planned(epoch)) - first_batch

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's batches, lists of indices. The epoch is the one chosen when the first batch is requested."""
        chosen = self._epoch_and_first_batch
        epoch, first_batch = chosen
        batches = self._planned(epoch)
        for index in range(first_batch, len(batches)):
            yield list(batches[index])
        # A loader that reads ahead may get here after the next set_epoch, whose choice must stay.
        if self._epoch_and_first_batch is chosen:
            self._epoch_and_first_batch = (epoch, 0)

    def _planned(self, epoch: int) -> list[list[int]]:
        """This rank's batches of an epoch. The last plan is cached."""
        if not self.shuffle:
            epoch = 0
        if self._planned_epoch != epoch:
            self._batches = self._plan(self._order(epoch))
            self._planned_epoch = epoch
        return self._batches

    def _order(self, epoch: int) -> Tensor:
        """int64 `[N]`, a permutation."""
        if not self.shuffle:
            return torch.arange(len(self._lengths), device="cpu")
        # A hash, so that seed 0 in epoch 1 differs from seed 1 in epoch 0. The generator uses 32 bits of its seed.
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
        return torch.randperm(len(self._lengths), generator=generator, device="cpu")

    def _plan(self, order: Tensor) -> list[list[int]]:
        lengths: list[int] = self._lengths[order].tolist()
        tokens_before = list(accumulate(lengths, initial=0))  # of Python's integers, which do not overflow
        indices: list[int] = order.tolist()
        shortest = min(lengths, default=0)
        batches = []
        first = 0
        while first < len(indices):
            end = bisect_right(tokens_before, tokens_before[first] + self.num_replicas * self.max_tokens) - 1
            if self.max_sequences is not None:
                end = min(end, first + self.num_replicas * self.max_sequences)
            rank_of = self._spread_as_many_as_fit(lengths[first:end])
            end = first + len(rank_of)
            if self.drop_last and end == len(indices) and self._has_room(lengths[first:end], rank_of, shortest):
                break
            mine = self.rank
            batches.append([indices[first + i] for i, rank in enumerate(rank_of) if rank == mine])
            first = end
        return batches

    def _spread_as_many_as_fit(self, lengths: list[int]) -> list[int]:
        """The rank of each of the first sequences of a chunk. A search finds how many of them fit."""
        longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)  # stable: ties are in order
        # As many sequences as ranks always fit. Usually at most a few are too many, so search backwards from the end in
        # growing steps, then bisect between the last two counts.
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
        """The rank of each of the first `count` sequences of a chunk; None if a rank would exceed max_tokens."""
        max_tokens, max_sequences = self.max_tokens, self.max_sequences
        # A heap of ranks by tokens, then by sequences, so that empty sequences are spread too.
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
                heapq.heappop(ranks)  # A chunk has at most max_sequences for each rank, so another rank is left.
            else:
                heapq.heapreplace(ranks, (tokens, sequences, rank))
        return rank_of

    def _has_room(self, lengths: list[int], rank_of: list[int], length: int) -> bool:
        """Whether one more sequence of that length would fit on some rank."""
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
