"""What the T5 examples share: users' histories as semantic IDs, and a loop that trains base and stamped models.

The data are MovieLens-100K from `recbole`, or a file that `load_interactions` reads. Items without semantic IDs get
some from the interactions. The examples t5_*.py differ in the model and in how it reads a batch.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stamp_kernels.integrations.transformers import PruningConfig
from stamp_kernels.profiling.data.interactions import load_interactions
from stamp_kernels.profiling.data.rows import EvaluationRows, Rows, TrainingRows
from stamp_kernels.profiling.data.semantic_ids import assign_semantic_ids
from stamp_kernels.profiling.measure import interleaved_step_times


class Batch(NamedTuple):
    """B users with up to S items, padded on the right, and their next item."""

    users: Tensor  # [B]
    codes: Tensor  # [B, S, L], of the history
    mask: Tensor  # [B, S] bool, False on padding
    target: Tensor  # [B, L], codes of the next item
    target_item: Tensor  # [B]


class Histories:
    """Every item has L = codes_per_item codes, each from 0 to codebook_size - 1."""

    def __init__(self, path: str | None, max_items: int) -> None:
        interactions = load_interactions(path)
        semantic_ids = interactions.semantic_ids
        if semantic_ids is None:
            semantic_ids = assign_semantic_ids(interactions)
        self.interactions = interactions
        self.device = torch.get_default_device()
        self.codes_of_item = torch.from_numpy(semantic_ids).to(self.device)  # [num_items, L]
        self.codes_per_item = semantic_ids.shape[1]
        self.codebook_size = int(semantic_ids.max()) + 1
        self.training, self.test = (
            TrainingRows(interactions, max_items),
            EvaluationRows(interactions, "test", max_items),
        )
        self.next_codes: dict[tuple[int, ...], set[int]] = {}  # those that follow a prefix in the catalogue
        for codes in semantic_ids.tolist():
            for level, code in enumerate(codes):
                self.next_codes.setdefault(tuple(codes[:level]), set()).add(code)

    def batch(self, rows: Rows, chosen: np.ndarray) -> Batch:
        users = np.searchsorted(self.interactions.offsets, rows.target[chosen], side="right") - 1
        items = [torch.from_numpy(rows.items[rows.start[i] : rows.target[i]]).to(self.device) for i in chosen]
        target = torch.from_numpy(rows.items[rows.target[chosen]]).to(self.device)
        padded = nn.utils.rnn.pad_sequence(items, batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([len(x) for x in items])[:, None]
        codes = self.codes_of_item
        return Batch(torch.from_numpy(users).to(self.device), codes[padded], mask, codes[target], target)

    def batches(self, rows: Rows, batch_size: int, seed: int = 0) -> Iterator[Batch]:
        """Endless, each epoch in another order."""
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(len(rows))
            for first in range(0, max(len(order) - batch_size, 0) + 1, batch_size):
                yield self.batch(rows, order[first : first + batch_size])


class Beams:
    """A beam search over the items that exist, level by level, for models with a head for each level.

    Attributes:
        codes: `[B, num_beams, l]` of the first l levels, the best beam of each user first.
    """

    def __init__(self, histories: Histories, num_users: int, num_beams: int) -> None:
        self.histories = histories
        self.codes = torch.empty(num_users, num_beams, 0, dtype=torch.int64)
        self.scores = torch.full((num_users, num_beams), -torch.inf)
        self.scores[:, 0] = 0  # at first all beams are equal, so that only one of them counts

    def advance(self, logits: Tensor) -> Tensor:
        """Add a code to every beam, by the logits `[B * num_beams, codebook_size]`. Returns the rows they continue."""
        num_users, num_beams, level = self.codes.shape
        candidates = self.scores[..., None] + logits.log_softmax(-1).view(num_users, num_beams, -1)
        for row, prefix in zip(candidates.flatten(0, 1), self.codes.flatten(0, 1).tolist(), strict=True):
            exist = torch.zeros(len(row), dtype=torch.bool)
            exist[list(self.histories.next_codes.get(tuple(prefix), ()))] = True
            row.masked_fill_(~exist, -torch.inf)
        self.scores, chosen = candidates.flatten(1).topk(num_beams, dim=1)
        beam, code = chosen // logits.shape[-1], chosen % logits.shape[-1]
        kept = self.codes.gather(1, beam[..., None].expand(-1, -1, level))
        self.codes = torch.cat([kept, code[..., None]], dim=-1)
        return (beam + num_beams * torch.arange(num_users)[:, None]).flatten()


class Recommender(Protocol):
    """What an example's class does. It is an nn.Module, made of the histories and T5's sizes."""

    def stamp(self, pruning: PruningConfig | None) -> None: ...

    def loss(self, batch: Batch) -> Tensor: ...

    def recommend(self, batch: Batch, num_beams: int) -> Tensor:
        """Codes `[B, num_beams, L]`, the best item first."""
        ...


def training_step(model: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    loss = model.loss(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def recall(beams: Tensor, batch: Batch) -> float:
    """The share of users whose next item is among the beams."""
    return (beams == batch.target[:, None]).all(-1).any(-1).float().mean().item()


def compare(
    build: Callable[..., Any],
    pruning: Callable[[Histories], dict[str, Any]],
    argv: Sequence[str] | None,
    description: str,
) -> dict[str, Any]:
    """Train a base model, the same one stamped, and one that prunes, on the same batches in turn. Print what they do.

    Args:
        build: makes a recommender of `(histories, **sizes)`, where sizes are T5Config's.
        pruning: options of PruningConfig besides its schedule, such as which ends of a history always stay.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", help="file of interactions, see load_interactions (default: MovieLens-100K)")
    parser.add_argument("--max-items", type=int, default=30, help="the most items of a history")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="training steps of each model")
    parser.add_argument("--keep-ratio", type=float, default=1 / 3, help="what the pruned model keeps of a history")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the encoder and of the decoder")
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.0, help="0: the base and the stamped model do the same")
    parser.add_argument("--beams", type=int, default=10)
    args = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_device(device)
    histories = Histories(args.data, args.max_items)
    sizes = dict(d_model=args.d_model, d_ff=8 * args.d_model, d_kv=64, num_heads=6, num_layers=args.layers)
    models = {}
    for name in ("base", "stamped", "stamped and pruned"):
        torch.manual_seed(0)  # the same weights
        models[name] = build(histories, **sizes, dropout_rate=args.dropout).train()
    models["stamped"].stamp(None)
    schedule = [(max(args.layers // 2, 1), args.keep_ratio)]  # after half of the encoder
    models["stamped and pruned"].stamp(PruningConfig(schedule, **pruning(histories)))

    stream = histories.batches(histories.training, args.batch_size)
    batches = [next(stream) for _ in range(args.steps)]
    losses: dict[str, list[float]] = {name: [] for name in models}

    def steps_of(name: str) -> Any:
        optimizer = torch.optim.AdamW(models[name].parameters(), lr=1e-3)
        return lambda i: losses[name].append(training_step(models[name], optimizer, batches[i]))

    warmup = 1 if args.steps > 1 else 0
    steps = {name: steps_of(name) for name in models}
    times = interleaved_step_times(steps, num_steps=args.steps - warmup, warmup=warmup, device=device)

    held_out = next(histories.batches(histories.test, args.batch_size))
    found = {name: model.eval().recommend(held_out, args.beams) for name, model in models.items()}
    for name in models:
        first, last, ms = losses[name][0], losses[name][-1], float(np.median(times[name]))
        print(f"{name:<20}loss {first:.6f} -> {last:.6f}  {ms:8.1f} ms per step", end="  ")
        print(f"recall@{args.beams} {recall(found[name], held_out):.3f}")
    models["stamped"].load_state_dict(models["base"].state_dict())
    same = torch.equal(models["stamped"].recommend(held_out, args.beams), found["base"])
    print(f"with the weights of the base model the stamped one finds the same beams: {'yes' if same else 'no'}")
    return {"losses": losses, "milliseconds": times, "beams": found, "same_beams": same}
