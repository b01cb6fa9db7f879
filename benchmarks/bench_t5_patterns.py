"""What stamping costs and saves in T5 recommenders as they are written in public, on the models of examples/t5_*.py.

    python benchmarks/bench_t5_patterns.py [--data FILE] [--batch-size 64] [--steps 5] [--output FILE.json]

For each pattern the base model, the same one stamped, and one that prunes train on the same batches, in interleaved
rounds. Before that, without dropout and in float32, the losses of base and stamped model are compared on the first
batch. After it the beams are compared: a stamped model with the weights of the trained base model searches for users of
the test split. Prints a Markdown table and writes JSON as the other results have it.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import t5_contrastive
import t5_dense_retrieval
import t5_own_loss
import t5_per_level_heads
import t5_tiger
from histories import Batch, Histories, training_step

from stamp_kernels.integrations.transformers import PruningConfig
from stamp_kernels.profiling.commands.report import write_json
from stamp_kernels.profiling.measure import (
    describe_device,
    describe_versions,
    interleaved_step_times,
    keep_freed_memory,
    peak_bytes,
    resident_bytes,
    summarize,
)

SCHEMA = "stamp-t5-patterns/1"
MODES = ("base", "stamped", "pruned")
SIZES = dict(d_model=128, d_ff=1024, d_kv=64, num_heads=6, num_layers=4)
PRUNE_AFTER_BLOCK = 2


def grid(histories: Histories, **sizes: Any) -> nn.Module:
    """GRID deletes T5's own embeddings, which it does not use."""
    model = t5_per_level_heads.PerLevelHeads(histories, **sizes)
    del model.encoder.shared, model.encoder.encoder.embed_tokens, model.decoder.embed_tokens
    return model


def rq_vae_recommender(histories: Histories, **sizes: Any) -> nn.Module:
    return t5_per_level_heads.PerLevelHeads(histories, has_users=False, **sizes)


class Pattern(NamedTuple):
    """How a repository uses T5.

    Attributes:
        description: in a few words.
        build: makes the recommender of `(histories, **sizes)`.
        pruning: options of PruningConfig besides its schedule, for the histories.
    """

    description: str
    build: Callable[..., Any]
    pruning: Callable[[Histories], dict[str, Any]]


PATTERNS = {
    "TIGER": Pattern(
        "T5ForConditionalGeneration, user token, </s>", t5_tiger.Tiger, t5_tiger.pruning_options
    ),
    "LETTER": Pattern(
        "own forward with its own loss of logits", t5_own_loss.Letter, t5_own_loss.pruning_options
    ),
    "GRID": Pattern(
        "T5EncoderModel, bare T5Stack, heads per level, user token", grid, t5_per_level_heads.pruning_options
    ),
    "RQ-VAE-Recommender": Pattern(
        "the same without a user token",
        rq_vae_recommender,
        lambda histories: dict(codes_per_item=histories.codes_per_item + 1),
    ),
    "liger": Pattern(
        "super().forward, last encoder state retrieves items",
        t5_dense_retrieval.DenseRetrieval,
        t5_dense_retrieval.pruning_options,
    ),
    "ETEGRec": Pattern(
        "embeddings in, hidden states out, contrastive loss of the mean state",
        t5_contrastive.Contrastive,
        t5_contrastive.pruning_options,
    ),
}  # fmt: skip


def models_of(pattern: Pattern, histories: Histories, keep_ratio: float, dropout: float) -> dict[str, Any]:
    """By mode, models with the same weights in training."""
    models = {}
    for mode in MODES:
        torch.manual_seed(0)
        models[mode] = pattern.build(histories, **SIZES, dropout_rate=dropout).train()
    models["stamped"].stamp(None)
    models["pruned"].stamp(PruningConfig([(PRUNE_AFTER_BLOCK, keep_ratio)], **pattern.pruning(histories)))
    return models


def measure(pattern: Pattern, histories: Histories, arguments: argparse.Namespace) -> dict[str, Any]:
    """All numbers of a pattern, as plain values."""
    device = histories.device
    stream = histories.batches(histories.training, arguments.batch_size)
    batches = [next(stream) for _ in range(arguments.warmup + arguments.steps)]
    held_out = next(histories.batches(histories.test, arguments.users))

    exact = models_of(pattern, histories, arguments.keep_ratio, dropout=0.0)
    first_losses = {mode: model.loss(batches[0]).item() for mode, model in exact.items()}
    del exact

    models = models_of(pattern, histories, arguments.keep_ratio, arguments.dropout)
    optimizers = {mode: torch.optim.AdamW(model.parameters(), lr=1e-3) for mode, model in models.items()}

    def step(mode: str, i: int) -> None:
        training_step(models[mode], optimizers[mode], batches[i])

    options = dict(warmup=arguments.warmup, device=device)
    times = interleaved_step_times({mode: partial(step, mode) for mode in MODES}, num_steps=arguments.steps, **options)
    largest = max(range(len(batches)), key=lambda i: batches[i].mask.shape[1])
    peaks = {
        mode: peak_bytes(
            partial(step, mode, largest), device, resident_bytes=resident_bytes(models[mode], optimizers[mode])
        )
        for mode in MODES
    }

    for model in models.values():
        model.load_state_dict(models["base"].state_dict())
        model.eval()
    searches = {mode: partial(search, models[mode], held_out, arguments.beams) for mode in MODES}
    searching = interleaved_step_times(searches, num_steps=arguments.searches, **options)
    found = {mode: searches[mode](0) for mode in MODES}
    agree = (found["stamped"] == found["base"]).flatten(1).all(1)
    return {
        "description": pattern.description,
        "first_loss": first_losses,
        "relative_loss_difference": abs(first_losses["stamped"] / first_losses["base"] - 1),
        "step_ms": {mode: summarize(times[mode]) for mode in MODES},
        "peak_bytes": peaks,
        "search_ms": {mode: summarize(searching[mode]) for mode in MODES},
        "users_with_the_same_beams": int(agree.sum()),
        "users": len(agree),
    }


def search(model: Any, batch: Batch, beams: int, i: int) -> torch.Tensor:
    found: torch.Tensor = model.recommend(batch, beams)
    return found


def markdown(patterns: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| pattern | relative difference of the loss | ms per step: base | stamped | stamped, pruned | "
        "peak MB: base / stamped / pruned | same beams | ms per search: base | stamped |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in patterns.items():
        steps = {mode: result["step_ms"][mode]["median"] for mode in MODES}
        searches = {mode: result["search_ms"][mode]["median"] for mode in MODES}
        same, users = result["users_with_the_same_beams"], result["users"]
        cells = [
            name,
            f"{result['relative_loss_difference']:.1e}",
            f"{steps['base']:,.0f}",
            *(f"{steps[mode]:,.0f} ({steps['base'] / steps[mode]:.2f}x)" for mode in MODES[1:]),
            " / ".join(f"{result['peak_bytes'][mode] / 1e6:,.0f}" for mode in MODES),
            "yes" if same == users else f"{same} of {users}",
            f"{searches['base']:,.0f}",
            f"{searches['stamped']:,.0f} ({searches['base'] / searches['stamped']:.2f}x)",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_data(histories: Histories, batch_size: int) -> dict[str, Any]:
    mask = next(histories.batches(histories.training, batch_size)).mask
    return {
        "name": histories.interactions.name,
        "source": histories.interactions.source,
        "training_rows": len(histories.training),
        "codes_per_item": histories.codes_per_item,
        "codebook_size": histories.codebook_size,
        "share_of_padding": round(1 - mask.float().mean().item(), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="data file as for stamp-profile (default: MovieLens-100K from recbole)")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--max-items", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="timed rounds of training steps")
    parser.add_argument("--searches", type=int, default=3, help="timed rounds of beam searches")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument("--users", type=int, default=32, help="users of the test split to search for")
    parser.add_argument("--beams", type=int, default=10)
    parser.add_argument("--keep-ratio", type=float, default=1 / 3)
    parser.add_argument("--dropout", type=float, default=0.1, help="of the timed steps")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_device(device)
    if device.type == "cpu":
        keep_freed_memory()

    histories = Histories(arguments.data, arguments.max_items)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("data", "output", "patterns")}
    given = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # without this machine's folders
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/bench_t5_patterns.py", *given]),
        "device": describe_device(device),
        "versions": describe_versions(),
        "data": describe_data(histories, arguments.batch_size),
        "settings": {**settings, "device": device.type, "dtype": "float32", "model": SIZES,
                     "prune_after_block": PRUNE_AFTER_BLOCK},
        "patterns": {},
    }  # fmt: skip
    print(json.dumps({name: report[name] for name in ("device", "data")}), file=sys.stderr)
    for name in arguments.patterns:
        report["patterns"][name] = measure(PATTERNS[name], histories, arguments)
        print(markdown(report["patterns"]).splitlines()[-1], file=sys.stderr, flush=True)
        if arguments.output is not None:
            write_json(report, arguments.output)  # after each, so that an interrupted run leaves what it has measured
    print(markdown(report["patterns"]))


if __name__ == "__main__":
    main()
