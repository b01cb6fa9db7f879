"""What the subcommands run: which configurations, how they are trained, and how large the model is."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from stamp_kernels.ops._checks import check_choice, check_count, check_range
from stamp_kernels.profiling.recommender.recommender import CONFIGURATIONS, RecommenderSettings

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-4
DTYPES = ("float32", "bfloat16")

# Called with the name of a stage, how much of it is done, and how much there is.
OnProgress = Callable[[str, int, int], object]


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """How configurations are trained, whatever is then measured.

    Attributes:
        configurations: names from `recommender.CONFIGURATIONS`, each once.
        batch_size: sequences per step.
        dtype: "float32", or "bfloat16" for bfloat16 autocast over float32 weights.
        device: where to run.
        epochs: passes over the training rows.
        max_items, min_items: the most items of a history, where it is cut, and the fewest of a training row, which is
            left out otherwise.
        rows: the size of a random sample of the training rows, the same for every seed. None: all rows.
        learning_rate: of AdamW, constant.
        model: sizes of the model. The data's codes_per_item and codebook_size replace the model's.

    Raises:
        ValueError: a value is out of range, or there is no configuration of that name.
    """

    configurations: tuple[str, ...]
    batch_size: int
    dtype: str
    device: torch.device
    epochs: int
    max_items: int
    min_items: int = 1
    rows: int | None = None
    learning_rate: float = LEARNING_RATE
    model: RecommenderSettings = field(default_factory=RecommenderSettings)

    def __post_init__(self) -> None:
        if not self.configurations or len(set(self.configurations)) < len(self.configurations):
            raise ValueError(f"configurations must be one or several different names, got {self.configurations}")
        for name in self.configurations:
            check_choice("configuration", name, CONFIGURATIONS)
        for name, minimum in {"batch_size": 1, "epochs": 0, "max_items": 1}.items():
            check_count(name, getattr(self, name), minimum)
        check_choice("dtype", self.dtype, DTYPES)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a finite number above 0, got {self.learning_rate}")
        _check_model(self.model)

    def describe(self, model: RecommenderSettings) -> dict[str, Any]:
        """The settings as a report shows them, with the sizes that the model has on the data."""
        left_out = ("configurations", "learning_rate", "model")
        return {
            **{name: value for name, value in asdict(self).items() if name not in left_out},
            "device": str(self.device),
            "model": asdict(model),
            "optimizer": {
                "name": "AdamW",
                "learning_rate": self.learning_rate,
                "weight_decay": WEIGHT_DECAY,
                "fused": True,
            },
        }


@dataclass(frozen=True, kw_only=True)
class TrainSettings(CommonSettings):
    """What `profile_training` runs. `epochs` follow the timed steps, from fresh weights; 0: only the timed steps.

    Attributes:
        steps, warmup: timed training steps of each configuration, and the steps before them that are not timed.
        seed: of the weights, the order of the rows and dropout.
        evaluate: whether to compute the metrics of the test split, without autocast.

    Raises:
        ValueError: as `CommonSettings`.
    """

    steps: int
    warmup: int
    seed: int
    evaluate: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, minimum in {"steps": 1, "warmup": 0, "seed": 0}.items():
            check_count(name, getattr(self, name), minimum)


@dataclass(frozen=True, kw_only=True)
class QualitySettings(CommonSettings):
    """What `measure_quality` runs.

    Attributes:
        seeds: every configuration is trained from the seeds 0 to `seeds - 1`.

    Raises:
        ValueError: as `CommonSettings`.
    """

    seeds: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seeds", "epochs"):
            check_count(name, getattr(self, name), 1)


def _check_model(model: RecommenderSettings) -> None:
    for name in ("num_layers", "d_model", "num_heads", "d_kv", "d_ff"):
        check_count(name, getattr(model, name), 1)
    if model.d_kv % 8 or model.d_kv > 256:
        raise ValueError(f"d_kv must be a multiple of 8 up to 256, got {model.d_kv}")
    check_count("prune_after_block", model.prune_after_block, 1)
    if model.prune_after_block > model.num_layers:
        raise ValueError(
            f"prune_after_block must be at most the number of layers, {model.num_layers}, got {model.prune_after_block}"
        )
    if not 0 < model.keep_ratio <= 1:
        raise ValueError(f"keep_ratio must be in (0, 1], got {model.keep_ratio}")
    check_range("dropout", model.dropout, 0, 1, below_high=True)
