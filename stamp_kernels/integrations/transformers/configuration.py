"""PruningConfig and PredictionConfig: the same for every base model, and stored in its config.json."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch

from stamp_kernels.modules._arguments import as_pairs
from stamp_kernels.modules.prediction import LinearDecay, MultiStepPrediction
from stamp_kernels.modules.pruning import SemanticAdaptivePruning
from stamp_kernels.ops._checks import check_choice, check_count, check_range, check_vocab_ranges

__all__ = ["PredictionConfig", "PruningConfig", "to_dict"]


@dataclasses.dataclass(frozen=True)
class PruningConfig:
    """SAP (arXiv 2604.05329): after which blocks to prune, and how. The default is the paper's T5 setting.

    Attributes:
        schedule: pairs (block, keep_ratio). Blocks are counted from 1, and tokens are pruned after the block.
        protect_first, protect_last: how many tokens at each end of a history are always kept, such as a user token in
            front or an end-of-sequence token behind. They do not count towards the budget. With codes_per_item they may
            have any length, and the tokens between them are whole items. Histories that are not longer than both ends
            are kept whole.
        codes_per_item: tokens of an item that are kept or dropped together. A separator behind every item is one of
            them. If the last item of a history has another token in the place of its separator, or none, choose a
            protect_last that keeps the last item too.
        norm, prune_in_eval, min_keep: as in `SemanticAdaptivePruning`.
        positions: as in `SemanticAdaptivePruning`. With `"none"` the blocks after the first pruning have no
            relative-position bias at all, as in RASTP's implementation.
        budget: as in `SemanticAdaptivePruning`. The max_seqlen of padded inputs is their padded length.
        layout: where the kept states are in the encoder's padded output. `"compact"` moves them to the left.
            `"original"` leaves each in the column of its token; the states of dropped tokens are 0 and the output's
            attention_mask is False there. Packed inputs have no columns to leave them in. Not with positions="compact".
        voters: whose attention the centrality adds up. With `"padded"` the padding of a padded batch votes too, as in
            padded implementations that mask keys but not queries, such as RASTP's. It votes at the first pruning,
            which drops it. The blocks up to there run on all columns, whose embeddings must be finite. Packed inputs
            have no padding.

    RASTP's implementation, whose padded length S is a multiple of 3, is `PruningConfig([(2, 1 / 3)], positions="none",
    budget="max_seqlen", voters="padded")`. It rounds S / 3 down: for another S, keep_ratio is `S // 3 / S`.

    Raises:
        ValueError: a value is not allowed, or the schedule has a block twice.
    """

    schedule: Sequence[tuple[int, float]] = ((2, 1 / 3),)
    protect_first: int = 0
    protect_last: int = 0
    norm: Literal["l1", "l2"] = "l1"
    positions: Literal["original", "compact", "none"] = "original"
    prune_in_eval: bool = True
    min_keep: int = 1
    codes_per_item: int | None = None
    budget: Literal["sequence", "max_seqlen"] = "sequence"
    layout: Literal["compact", "original"] = "compact"
    voters: Literal["tokens", "padded"] = "tokens"

    def __post_init__(self) -> None:
        schedule = [
            (check_count(f"schedule[{i}][0]", block), float(check_range(f"schedule[{i}][1]", keep_ratio, 0.0, 1.0)))
            for i, (block, keep_ratio) in enumerate(as_pairs("schedule", self.schedule, "pairs (block, keep_ratio)"))
        ]
        _set(self, schedule=tuple(schedule))
        blocks = [block for block, _ in self.schedule]
        if len(set(blocks)) < len(blocks) or min(blocks, default=1) < 1:
            raise ValueError(f"schedule must have blocks from 1 on, each once, got {self.schedule}")
        _set_counts(self, protect_first=0, protect_last=0, min_keep=0, codes_per_item=1)
        check_choice("positions", self.positions, ("original", "compact", "none"))
        check_choice("layout", self.layout, ("compact", "original"))
        check_choice("voters", self.voters, ("tokens", "padded"))
        if self.layout == "original" and self.positions == "compact":
            raise ValueError('layout="original" needs the original positions, got positions="compact"')
        self.build_modules()

    def check_blocks(self, num_blocks: int) -> None:
        """Raises:
        ValueError: the schedule has a block that a trunk of `num_blocks` blocks does not have.
        """
        for block, _ in self.schedule:
            if block > num_blocks:
                raise ValueError(f"schedule must have blocks from 1 to {num_blocks}, got {block}")

    def build_modules(self) -> dict[int, SemanticAdaptivePruning]:
        """The pruning modules, by the number of the block after which each prunes."""
        return {
            block: SemanticAdaptivePruning(
                keep_ratio,
                norm=self.norm,
                positions="original" if self.positions == "none" else self.positions,
                prune_in_eval=self.prune_in_eval,
                min_keep=self.min_keep,
                codes_per_item=self.codes_per_item,
                budget=self.budget,
                protect_first=self.protect_first,
                protect_last=self.protect_last,
            )
            for block, keep_ratio in self.schedule
        }


@dataclasses.dataclass(frozen=True)
class PredictionConfig:
    """MAP (arXiv 2604.05329): which further items to predict in training, and with which heads.

    Attributes:
        num_steps: the number of steps beyond the labels.
        codes_per_item: codes of an item. The labels of a user are whole items, with eos_token_id behind them if that is
            set.
        unit: what a step counts. With `"item"`, step k of a position predicts the same code of the item k further on;
            with `"token"`, the token k further on.
        head: the kind of head, one for each step, see `MultiStepPrediction`.
        unembedding: `"shared"` is the base model's language-model head. `"own"` is one more matrix over the same
            vocabulary that all heads share; with vocab_ranges its slices are a head for each level.
        vocab_ranges: for each level the (start, end) of its codes in the vocabulary. The softmax of a level then runs
            only over this range. Needs unit="item". None: the whole vocabulary.
        step_weights, lambda_, num_attention_heads: as in `MultiStepPrediction`.
        eos_token_id: the end-of-sequence token, if the labels have one behind the last item of a user. The next-token
            loss trains it. It is no part of an item: no step is predicted from it, and none predicts it. Labels may
            then have any number of columns.

    Raises:
        ValueError: a value is not allowed.
    """

    num_steps: int = 3
    codes_per_item: int = 4
    unit: Literal["item", "token"] = "item"
    head: Literal["linear", "residual", "transformer"] = "residual"
    unembedding: Literal["shared", "own"] = "shared"
    vocab_ranges: Sequence[tuple[int, int]] | None = None
    step_weights: Sequence[float] | None = None
    lambda_: float | LinearDecay = 0.3
    num_attention_heads: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        _set_counts(self, num_steps=1, codes_per_item=1, num_attention_heads=1, eos_token_id=0)
        check_choice("unit", self.unit, ("item", "token"))
        check_choice("unembedding", self.unembedding, ("shared", "own"))
        if self.vocab_ranges is not None:
            _set(self, vocab_ranges=check_vocab_ranges(self.vocab_ranges))
            if (self.unit, len(self.vocab_ranges)) != ("item", self.codes_per_item):
                raise ValueError(
                    f"vocab_ranges must have one (start, end) for each of the {self.codes_per_item} levels and needs "
                    f'unit="item", got {self.vocab_ranges} and unit={self.unit!r}'
                )
            if self.eos_token_id is not None and any(a <= self.eos_token_id < b for a, b in self.vocab_ranges):
                raise ValueError(f"eos_token_id must be outside of vocab_ranges, got {self.eos_token_id}")
        if isinstance(self.lambda_, list | tuple):  # JSON makes lists of tuples
            if len(self.lambda_) != 3:
                raise ValueError(f"lambda_ must be a number or LinearDecay(start, end, steps), got {self.lambda_}")
            start, end, steps = self.lambda_
            start, end = check_range("lambda_[0]", start, 0.0), check_range("lambda_[1]", end, 0.0)
            _set(self, lambda_=LinearDecay(start, end, check_count("lambda_[2]", steps)))
        elif callable(self.lambda_):
            raise ValueError(f"lambda_ must be a number or a LinearDecay, which JSON can store, got {self.lambda_}")
        with torch.device("meta"):
            heads = self.build_module(hidden_size=8 * (self.num_attention_heads or 1), vocab_size=1)
        # As the module has checked and converted them.
        _set(self, step_weights=heads.step_weights, lambda_=heads.lambda_)
        if heads.vocab_ranges is not None:
            _set(self, vocab_ranges=heads.vocab_ranges[: self.codes_per_item])

    @property
    def stride(self) -> int:
        """Tokens from one step to the next."""
        return self.codes_per_item if self.unit == "item" else 1

    def build_module(self, hidden_size: int, vocab_size: int) -> MultiStepPrediction:
        """The heads for states of this width and for this vocabulary."""
        return MultiStepPrediction(
            hidden_size,
            self.num_steps,
            head=self.head,
            vocab_size=vocab_size if self.unembedding == "own" else None,
            step_weights=self.step_weights,
            lambda_=self.lambda_,
            codes_per_item=self.codes_per_item,
            vocab_ranges=None if self.vocab_ranges is None else tuple(self.vocab_ranges) * self.num_steps,
            num_attention_heads=self.num_attention_heads,
        )


def _set(config: PruningConfig | PredictionConfig, **values: Any) -> None:
    """Set fields of a frozen configuration, in its __post_init__."""
    for name, value in values.items():
        object.__setattr__(config, name, value)


def _set_counts(config: PruningConfig | PredictionConfig, **minimums: int) -> None:
    """Check the fields that are counts, where None is allowed only as the default. NumPy's become Python's."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, minimum in minimums.items():
        value = getattr(config, name)
        if value is not None or defaults[name] is not None:
            _set(config, **{name: check_count(name, value, minimum)})


def to_dict(config: PruningConfig | PredictionConfig | None) -> dict[str, Any] | None:
    """What goes into config.json: `type(config)(**to_dict(config)) == config`."""
    return None if config is None else dataclasses.asdict(config)
