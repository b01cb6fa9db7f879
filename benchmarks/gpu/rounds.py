"""What the programs of a launch execute, counted from the workload's lengths and the launch's tile.

One function for each kernel. It says how many programs have work, and how often a program runs each loop. Loops have
the names of `machine_code.Loop`: function and variable of the source. Everything comes from the recorded arguments of
the launch and from the workload, so other tiles, grids and machine code need no change here; a loop that is new or has
another name does.

Simplifications: both sides of a branch are counted; programs without work are not; a tenth of the targets is ignored,
as in `CrossEntropy.inputs`; no workload has tail rows.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from math import ceil, prod
from typing import Any, NamedTuple

from workloads import Attention, CrossEntropy, Gather, Prune, Workload

from stamp_kernels.triton_kernels.aot import Launch

# How often a loop runs each time a program comes to it, on average. Several numbers are for its copies in the order of
# the code, such as the loop over whole tiles and the one over the masked rest.
Rounds = float | tuple[float, ...]


class Execution(NamedTuple):
    """What one launch executes.

    Attributes:
        programs: programs that have work.
        rounds: by name of a loop.
        outside: the share of the code outside of loops that a program runs.
        flops: of the matrix products, with the padding of the tiles.
        dependent_rounds: rounds of the longest program that each wait for memory, in kernels of few programs.
        num_bytes: memory traffic; None: every tensor among the arguments once.
    """

    programs: int
    rounds: Mapping[str, Rounds] = {}
    outside: float = 1.0
    flops: float = 0.0
    dependent_rounds: float = 0.0
    num_bytes: float | None = None


def execution(launch: Launch, workload: Workload) -> Execution | None:
    """None for a kernel that has no function here, or without an argument that the function reads."""
    try:
        return _EXECUTIONS[launch.name](launch, workload)
    except (KeyError, AttributeError):
        return None


def _tiles(n: int, block: int) -> int:
    return ceil(n / block)


# Attention


class _Pair(NamedTuple):
    """The lengths of a sequence, and how many sequences have them."""

    num_queries: int
    num_keys: int
    count: int


def _pairs(workload: Attention) -> list[_Pair]:
    lengths = zip(workload.lengths_q or workload.lengths, workload.lengths, strict=True)
    return [_Pair(*pair, count) for pair, count in Counter(lengths).items()]


def _keys_seen(query: int, pair: _Pair, causal: bool) -> int:
    """As `num_keys_seen` of the kernels, not below 0."""
    return max(0, min(query + 1 + pair.num_keys - pair.num_queries, pair.num_keys)) if causal else pair.num_keys


def _search_rounds(num_sequences: int) -> int:
    """Rounds of `_search_tile`, each over 128 candidates."""
    rounds, count = 0, num_sequences
    while count > 1:
        rounds, count = rounds + 1, _tiles(count, 128)
    return rounds


def _attention_execution(
    launch: Launch, workload: Attention, programs: int, products: int, rounds: dict[str, Rounds], tile_rounds: float,
    **more: Any,
) -> Execution:  # fmt: skip
    """Adds what the kernels share. `tile_rounds` is the number of tiles of scores of a program."""
    tile = launch.arguments["tile"]
    flops = products * 2 * tile.block_m * tile.block_n * tile.block_d * tile_rounds * programs
    shared: dict[str, Rounds] = {"_search_tile.while": _search_rounds(len(workload.lengths))}
    # The loops over tail rows, and over a tile's heads there
    tail = ("zero_tail.start", "zero_tail_values.start", f"{launch.name}.i")
    shared |= dict.fromkeys(tail, 0)
    return Execution(programs, shared | rounds, flops=flops, **more)


def _forward_general(launch: Launch, workload: Attention) -> Execution:
    """Tiles of queries; whole tiles of keys that all queries see, then the masked ones."""
    tile, num_heads = launch.arguments["tile"], launch.arguments["num_heads"]
    tiles = whole = masked = 0
    for pair in _pairs(workload):
        for start in range(0, pair.num_queries, tile.queries):
            seen_by_all = _keys_seen(start, pair, tile.causal) // tile.block_n
            seen_by_any = _tiles(_keys_seen(start + tile.queries - 1, pair, tile.causal), tile.block_n)
            tiles += pair.count
            whole += pair.count * seen_by_all
            masked += pair.count * (seen_by_any - seen_by_all)
    rounds: dict[str, Rounds] = {"_attend_keys.start_k": (whole / tiles, masked / tiles)}
    return _attention_execution(launch, workload, tiles * num_heads // tile.heads, 2, rounds, (whole + masked) / tiles)


def _forward_slots(launch: Launch, workload: Attention) -> Execution:
    """One tile for several sequences, without a loop."""
    tile = launch.arguments["tile"]
    programs = _tiles(len(workload.lengths), tile.block_m // tile.slot) * launch.arguments["num_heads"]
    return _attention_execution(launch, workload, programs, 2, {}, 1)


def _backward_query(launch: Launch, workload: Attention) -> Execution:
    """Tiles of queries, all keys that their last query sees, those that all see first if they have their own loop.

    The positions of all workloads rise, so no tile takes a pass for each bucket.
    """
    tile, num_heads = launch.arguments["tile"], launch.arguments["num_heads"]
    tiles = whole = masked = 0
    for pair in _pairs(workload):
        for start in range(0, pair.num_queries, tile.queries):
            last_query = min(start + tile.queries, pair.num_queries) - 1
            seen_by_all = _keys_seen(start, pair, tile.causal) // tile.block_n if tile.has_whole_blocks else 0
            seen_by_any = _tiles(_keys_seen(last_query, pair, tile.causal), tile.block_n)
            tiles += pair.count
            whole += pair.count * seen_by_all
            masked += pair.count * (seen_by_any - seen_by_all)
    by_name: dict[str, Rounds] = {
        "_add_keys.start_k": (whole / tiles, masked / tiles) if tile.has_whole_blocks else masked / tiles,
        "_add_by_bucket.bucket": 0,
    }
    programs = tiles * num_heads // tile.heads
    return _attention_execution(launch, workload, programs, 3, by_name, (whole + masked) / tiles)


def _backward_key(launch: Launch, workload: Attention) -> Execution:
    """Tiles of keys; for each head of the group, all queries from the first that sees one of the keys."""
    tile, num_heads_kv = launch.arguments["tile"], launch.arguments["num_heads_kv"]
    tiles = rounds = 0
    for pair in _pairs(workload):
        for start in range(0, pair.num_keys, tile.block_n):
            first = max(start + pair.num_queries - pair.num_keys, 0) // tile.queries * tile.queries
            tiles += pair.count
            rounds += pair.count * _tiles(max(pair.num_queries - (first if tile.causal else 0), 0), tile.queries)
    by_name: dict[str, Rounds] = {
        "stamp_attention_bwd_key_kernel.head_in_group": tile.gqa_group_size // tile.heads,
        "stamp_attention_bwd_key_kernel.start_q": rounds / tiles,
    }
    tile_rounds = tile.gqa_group_size // tile.heads * rounds / tiles
    return _attention_execution(launch, workload, tiles * num_heads_kv, 4, by_name, tile_rounds)


def _centrality(launch: Launch, workload: Attention) -> Execution:
    """Tiles of keys, all heads, all queries; with a causal order the tiles on the diagonal in a copy of their own."""
    tile, num_heads = launch.arguments["tile"], launch.arguments["num_heads"]
    tiles = masked = whole = 0
    for pair in _pairs(workload):
        for start in range(0, pair.num_keys, tile.block_n):
            shift, first_seeing_any, first_seeing_all = pair.num_queries - pair.num_keys, 0, 0
            if tile.causal:
                first_seeing_any = max(start + shift, 0) // tile.block_m
                first_seeing_all = _tiles(max(start + tile.block_n - 1 + shift, 0), tile.block_m)
            all_tiles = _tiles(pair.num_queries, tile.block_m)
            tiles += pair.count
            masked += pair.count * (min(first_seeing_all, all_tiles) - min(first_seeing_any, all_tiles))
            whole += pair.count * max(all_tiles - first_seeing_all, 0)
    of_queries: Rounds = (masked / tiles, whole / tiles) if tile.causal else whole / tiles
    by_name: dict[str, Rounds] = {
        "stamp_attention_centrality_kernel.head": num_heads,
        "_add_queries.start_q": of_queries,
    }
    return _attention_execution(launch, workload, tiles, 1, by_name, num_heads * (masked + whole) / tiles)


def _unrolled(rounds: int) -> tuple[float, float]:
    """Rounds of a short loop that the compiler has unrolled four times, and of the copy for the rest."""
    return rounds // 4, rounds % 4


def _sum_over_tiles(launch: Launch, workload: Attention) -> Execution:
    """Some tiles a round."""
    arguments = launch.arguments
    tiles = min(arguments["num_tiles"], arguments["MAX_TILES"])
    rounds = _tiles(tiles, arguments["BLOCK_TILES"])
    return Execution(prod(launch.grid), {"stamp_attention_bwd_bias_kernel.start": rounds}, dependent_rounds=rounds)


def _sum_over_heads(launch: Launch, workload: Attention) -> Execution:
    rounds = _unrolled(launch.arguments["num_heads"])
    return Execution(launch.grid[0], {"stamp_attention_fwd_centrality_kernel.head": rounds})


# Cross-entropy


def _list_rows(launch: Launch, workload: CrossEntropy) -> Execution:
    """The loads of all targets of a row are on their way at once. Then come the counts of the blocks before."""
    rounds = _tiles(launch.grid[0] - 1, launch.arguments["BLOCK"])
    return Execution(
        prod(launch.grid), {"stamp_cross_entropy_list_rows_kernel.start": rounds}, dependent_rounds=1 + rounds
    )


def _row_tiles(launch: Launch, workload: CrossEntropy) -> int:
    """Tiles of the rows that have a target of one hidden."""
    return _tiles(workload.num_listed, launch.arguments["tile"].block_n)


def _feature_rounds(launch: Launch) -> dict[str, Rounds]:
    """Loops over the features of a row: a product of wide rows, and the logits of targets."""
    rounds = _tiles(launch.arguments["layout"].width, launch.arguments["tile"].block_k)
    return {"multiply.start": rounds, "target_logits.start": rounds}


def _cross_entropy_forward(launch: Launch, workload: CrossEntropy) -> Execution:
    """Tiles of rows against a split of the classes, in whole tiles and one masked rest."""
    tile, num_splits = launch.arguments["tile"], launch.grid[2]
    whole = masked = 0
    for start in range(0, workload.num_classes, launch.arguments["CLASSES_PER_SPLIT"]):
        classes = min(workload.num_classes - start, launch.arguments["CLASSES_PER_SPLIT"])
        whole += classes // tile.block_v
        masked += classes % tile.block_v > 0
    programs = _row_tiles(launch, workload) * launch.grid[1] * num_splits
    rounds: dict[str, Rounds] = {"_add_classes.start": (whole / num_splits, masked / num_splits)}
    products = 2 * tile.block_n * tile.block_v * launch.arguments["layout"].width
    return Execution(
        programs, _feature_rounds(launch) | rounds, flops=products * (whole + masked) * programs / num_splits
    )


def _cross_entropy_combine(launch: Launch, workload: CrossEntropy) -> Execution:
    rounds: dict[str, Rounds] = {
        "stamp_cross_entropy_fwd_combine_kernel.split": _unrolled(launch.arguments["num_splits"])
    }
    return Execution(_row_tiles(launch, workload) * launch.grid[1], _feature_rounds(launch) | rounds)


def _cross_entropy_reduce(launch: Launch, workload: CrossEntropy) -> Execution:
    """One program, step by step."""
    num_steps = launch.arguments["num_steps"]
    rounds = _tiles(launch.arguments["num_tiles"], launch.arguments["BLOCK"])
    by_name: dict[str, Rounds] = {
        "stamp_cross_entropy_fwd_reduce_kernel.step": num_steps,
        "stamp_cross_entropy_fwd_reduce_kernel.start": rounds,
    }
    return Execution(1, by_name, dependent_rounds=num_steps * rounds)


def _row_terms(launch: Launch, workload: CrossEntropy) -> Execution:
    """With a cap, the logits of the targets."""
    rounds = _tiles(launch.arguments["layout"].width, launch.arguments["BLOCK_K"])
    return Execution(prod(launch.grid), {"target_logits.start": rounds})


def _hidden_gradient(launch: Launch, workload: CrossEntropy) -> Execution:
    """Tiles of rows and a block of features; every softmax over the rows, a split of its classes."""
    tile, layout = launch.arguments["tile"], launch.arguments["layout"]
    num_splits = launch.grid[2] // _tiles(layout.width, tile.block_d)
    softmaxes = 1 if layout.hidden_per_step else launch.arguments["num_softmaxes"]
    classes_of_split = _tiles(_tiles(workload.num_classes, tile.block_v), num_splits) * tile.block_v
    whole = masked = 0
    for split in range(num_splits):
        classes = max(min(classes_of_split, workload.num_classes - split * classes_of_split), 0)
        whole += classes // tile.block_v
        masked += classes % tile.block_v > 0
    programs = _row_tiles(launch, workload) * launch.grid[1] * launch.grid[2]
    rounds: dict[str, Rounds] = {
        "stamp_cross_entropy_bwd_hidden_kernel.softmax_index": softmaxes,
        "stamp_cross_entropy_bwd_hidden_kernel.i": layout.steps_per_softmax,
        "_add_hidden_gradient.start": (whole / num_splits, masked / num_splits),
    }
    products = 2 * tile.block_n * tile.block_v * (layout.width + tile.block_d)
    return Execution(
        programs,
        _feature_rounds(launch) | rounds,
        flops=products * softmaxes * (whole + masked) / num_splits * programs,
    )


def _weight_gradient(launch: Launch, workload: CrossEntropy) -> Execution:
    """Tiles of classes and a block of features; a split of the rows of every softmax over the weight.

    Softmaxes over other classes (codebooks) have no rows for a tile.
    """
    tile, layout = launch.arguments["tile"], launch.arguments["layout"]
    num_splits = launch.grid[2] // _tiles(layout.width, tile.block_d)
    softmaxes = 1 if launch.arguments["WEIGHT_PER_STEP"] else launch.arguments["num_softmaxes"]
    softmaxes_with_rows = softmaxes if launch.arguments["ALL_CLASSES"] else 1
    row_tiles = _row_tiles(launch, workload) / num_splits
    rounds: dict[str, Rounds] = {
        "stamp_cross_entropy_bwd_weight_kernel.softmax_index": softmaxes,
        "stamp_cross_entropy_bwd_weight_kernel.start": row_tiles * softmaxes_with_rows / softmaxes,
    }
    programs = prod(launch.grid)
    products = 2 * tile.block_n * tile.block_v * (layout.width + tile.block_d)
    return Execution(
        programs, _feature_rounds(launch) | rounds, flops=products * row_tiles * softmaxes_with_rows * programs
    )


def _chunk(launch: Launch, workload: CrossEntropy) -> Execution:
    """A row; two passes over its classes, of which each reads the logits and the second one writes in their place."""
    rounds = _tiles(launch.arguments["NUM_CLASSES"], launch.arguments["BLOCK"])
    return Execution(
        launch.grid[0],
        {"stamp_cross_entropy_chunk_kernel.start": rounds},
        num_bytes=3 * launch.arguments["logits"].ptr.nbytes,
    )


# Pruning


def _importance(launch: Launch, workload: Prune) -> Execution:
    return Execution(launch.grid[0], {"importance_of_rows.start": _column_rounds(launch)})


def _column_rounds(launch: Launch) -> int:
    return _tiles(launch.arguments["WIDTH"], launch.arguments["COLUMNS"])


def _kept_offsets(launch: Launch, workload: Prune) -> Execution:
    """One program passes over the sequences."""
    rounds = _tiles(launch.arguments["num_sequences"], launch.arguments["BLOCK"])
    return Execution(1, {"write_kept_offsets.start": rounds}, dependent_rounds=rounds)


def _importance_and_offsets(launch: Launch, workload: Prune) -> Execution:
    """The offsets of the kept tokens in one program, the importance in the others."""
    programs, offsets = launch.grid[0], _kept_offsets(launch, workload)
    rounds: dict[str, Rounds] = {
        "importance_of_rows.start": _column_rounds(launch) * (programs - 1) / programs,
        "write_kept_offsets.start": offsets.dependent_rounds / programs,
    }
    return Execution(programs, rounds, dependent_rounds=offsets.dependent_rounds)


def _select_short(launch: Launch, workload: Prune) -> Execution:
    """The binary search stops early; all 32 bits of a key are counted."""
    return Execution(launch.grid[0], {"stamp_select_tokens_short_kernel.while": 32, "fill_tails.row": 0})


def _gather(launch: Launch, workload: Prune | Gather) -> Execution:
    """Reads as many rows as it writes at most, and fewer where the map has -1."""
    num_bytes = launch.arguments["row_map_ptr"].nbytes
    for y, x in zip(launch.arguments["y"], launch.arguments["x"], strict=True):  # reinterpreted as integers
        num_bytes += y.base.nbytes + min(x.base.nbytes, y.base.nbytes)
    return Execution(prod(launch.grid), num_bytes=num_bytes)


def _without_loops(launch: Launch, workload: Workload) -> Execution:
    return Execution(prod(launch.grid))


_EXECUTIONS: dict[str, Callable[[Launch, Any], Execution]] = {
    "stamp_attention_fwd_general_kernel": _forward_general,
    "stamp_attention_fwd_slots_kernel": _forward_slots,
    "stamp_attention_fwd_centrality_kernel": _sum_over_heads,
    "stamp_attention_centrality_kernel": _centrality,
    "stamp_attention_bwd_query_kernel": _backward_query,
    "stamp_attention_bwd_key_kernel": _backward_key,
    "stamp_attention_bias_kernel": _without_loops,
    "stamp_attention_bwd_bias_kernel": _sum_over_tiles,
    "stamp_cross_entropy_count_rows_kernel": _without_loops,
    "stamp_cross_entropy_list_rows_kernel": _list_rows,
    "stamp_cross_entropy_fwd_kernel": _cross_entropy_forward,
    "stamp_cross_entropy_fwd_combine_kernel": _cross_entropy_combine,
    "stamp_cross_entropy_fwd_reduce_kernel": _cross_entropy_reduce,
    "stamp_cross_entropy_bwd_row_terms_kernel": _row_terms,
    "stamp_cross_entropy_bwd_hidden_kernel": _hidden_gradient,
    "stamp_cross_entropy_bwd_weight_kernel": _weight_gradient,
    "stamp_cross_entropy_chunk_kernel": _chunk,
    "stamp_token_importance_kernel": _importance,
    "stamp_kept_offsets_kernel": _kept_offsets,
    "stamp_prune_importance_and_offsets_kernel": _importance_and_offsets,
    "stamp_select_tokens_short_kernel": _select_short,
    "stamp_gather_rows_kernel": _gather,
}
