"""The targets of multi-step prediction for an encoder-decoder, and how many there are over all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from stamp_kernels.integrations.configuration import PredictionConfig
from stamp_kernels.ops._checks import check_tensor

IGNORE_INDEX = -100


def multi_step_targets(labels: Tensor, future_ids: Tensor, prediction: PredictionConfig) -> Tensor:
    """What each decoder position predicts besides its label: the label k strides further on.

    Args:
        labels: int64 `[B, N]`, whole items.
        future_ids: int64 `[B, M]`, the tokens that follow the labels; -100 where the history has ended.

    Returns:
        int64 `[B, N, num_steps]`, -100 where there is no target.

    Raises:
        ValueError: an argument has a wrong shape or dtype, or the labels are no whole items.
    """
    check_tensor("labels", labels, shape=["batch", "num_labels"])
    batch, num_labels = labels.shape
    check_tensor("future_ids", future_ids, shape=[batch, "num_future"], dtypes=[labels.dtype], device=labels.device)
    if num_labels % prediction.levels != 0:
        raise ValueError(f"labels must be whole items of {prediction.levels} levels, got {list(labels.shape)}")
    tokens = torch.cat([labels, future_ids], dim=1)
    missing = num_labels + prediction.num_steps * prediction.stride - tokens.shape[1]
    tokens = F.pad(tokens, (0, max(missing, 0)), value=IGNORE_INDEX)
    firsts = (step * prediction.stride for step in range(1, prediction.num_steps + 1))
    return torch.stack([tokens[:, first : first + num_labels] for first in firsts], dim=-1)


def global_target_counts(
    labels: Tensor,
    future_ids: Tensor | None = None,
    prediction: PredictionConfig | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """How many targets the losses of all ranks have together, as arguments of a stamped model's forward.

    Ranks that pack by a token budget have different numbers of sequences, and means over each rank's own would weigh
    them alike. With these counts the ranks' losses add up to the loss of the whole batch. Where gradients are averaged
    over the ranks (DDP, FSDP2), multiply the loss by their number:

        counts = global_target_counts(batch["labels"], batch["future_ids"], prediction)
        loss = model(**batch, **counts).loss * dist.get_world_size()

    One all-reduce of a few integers. Where no process group is initialized these are this batch's own counts. With
    accumulated steps, add the counts of the steps and give the sum to each.

    Args:
        labels: int64 `[B, N]`, as given to the model; -100 where a decoder_attention_mask hides a position.
        future_ids, prediction: where the model predicts further steps, what it is given and its configuration.
        group: the ranks that share the batch; None: all.

    Returns:
        `num_items_in_batch`, int64 scalar; with prediction `num_future_targets` too, int64 `[num_steps, levels]`.

    Raises:
        ValueError: future_ids goes with prediction and one is missing, or see `multi_step_targets`.
    """
    if (future_ids is None) != (prediction is None):
        missing = "future_ids" if future_ids is None else "prediction"
        raise ValueError(f"future_ids and prediction go together, got None for {missing}")
    counts = (labels != IGNORE_INDEX).sum()[None]
    if prediction is not None:
        targets = multi_step_targets(labels, future_ids, prediction).unflatten(1, (-1, prediction.levels))
        counts = torch.cat([counts, (targets != IGNORE_INDEX).sum((0, 1)).t().flatten()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts, group=group)
    result = {"num_items_in_batch": counts[0]}
    if prediction is not None:
        result["num_future_targets"] = counts[1:].view(prediction.num_steps, prediction.levels)
    return result
