"""The targets of multi-step prediction for an encoder-decoder, and their number over all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from stamp_kernels.common.contents import contents_are_checked
from stamp_kernels.integrations.transformers.configuration import PredictionConfig
from stamp_kernels.integrations.transformers.padded_layout import PaddedLayout
from stamp_kernels.ops._checks import check_tensor
from stamp_kernels.ops.pruning.selection import TokenSelection

__all__ = ["IGNORE_INDEX", "global_target_counts", "item_rows", "multi_step_targets"]

IGNORE_INDEX = -100


def multi_step_targets(labels: Tensor, future_ids: Tensor, prediction: PredictionConfig) -> Tensor:
    """What each decoder position predicts besides its label: the tokens 1, 2, ... strides further on in the history.

    Args:
        labels: int64 `[B, N]`, whole items; -100 behind a user's last item and on positions that are not trained. These
            positions have no targets. With eos_token_id, it follows the last item of a user, and N may be any number.
        future_ids: int64 `[B, M]`, the tokens that follow each user's last item; -100 after the end of the history.

    Returns:
        int64 `[B, N', num_steps]`, -100 where there is no target. N' are the columns of whole items, the first of N.

    Raises:
        ValueError: an argument has a wrong shape or dtype, or the labels are not whole items.
        RuntimeError: eos_token_id or a label is at a place where it cannot be (checked on the CPU, or under
            STAMP_KERNELS_CHECK=1).
    """
    check_tensor("labels", labels, shape=["batch", "num_labels"])
    batch, num_labels = labels.shape
    check_tensor("future_ids", future_ids, shape=[batch, "num_future"], dtypes=[labels.dtype], device=labels.device)
    codes_per_item, eos = prediction.codes_per_item, prediction.eos_token_id
    if num_labels % codes_per_item != 0 and eos is None:
        raise ValueError(
            f"labels must be whole items of {codes_per_item} codes, got {list(labels.shape)}: name an end-of-sequence "
            f"token behind them as PredictionConfig(eos_token_id=...)"
        )
    if eos is not None:
        labels = _whole_items(labels, codes_per_item, eos)
        future_ids = future_ids.masked_fill(future_ids == eos, IGNORE_INDEX)
        num_labels = labels.shape[1]
    has_label = labels != IGNORE_INDEX
    column = torch.arange(num_labels, device=labels.device)
    last = F.pad(torch.where(has_label, column, -1), (1, 0), value=-1).amax(1)  # [B], -1 without labels
    end = (last // codes_per_item + 1) * codes_per_item  # [B], the place where the future begins
    end = end[:, None, None]
    step = torch.arange(1, prediction.num_steps + 1, device=labels.device)
    place = column[:, None] + step * prediction.stride  # [N', K], of the targets, counted from the first label
    # The last column is the target of every place behind the future.
    tokens = F.pad(torch.cat([labels, future_ids], dim=1), (0, 1), value=IGNORE_INDEX)  # [B, N' + M + 1]
    source = torch.where(place < end, place, num_labels + place - end).clamp(max=tokens.shape[1] - 1)  # [B, N', K]
    targets = tokens.gather(1, source.flatten(1)).view(batch, num_labels, prediction.num_steps)
    return targets.masked_fill(~has_label[..., None], IGNORE_INDEX)


def _whole_items(labels: Tensor, codes_per_item: int, eos: int) -> Tensor:
    """The columns of whole items, with -100 from the end-of-sequence token on."""
    is_eos = labels == eos
    codes = labels.masked_fill(is_eos.cumsum(1) > 0, IGNORE_INDEX)
    num_columns = labels.shape[1] // codes_per_item * codes_per_item
    if contents_are_checked(labels.device):
        inside = is_eos.nonzero()
        inside = inside[inside[:, 1] % codes_per_item != 0]
        if len(inside) > 0:
            raise RuntimeError(
                f"labels must have eos_token_id {eos} only behind whole items of {codes_per_item} codes, "
                f"got it at {inside[0].tolist()}"
            )
        cut_off = (codes[:, num_columns:] != IGNORE_INDEX).nonzero()
        if len(cut_off) > 0:
            b, n = int(cut_off[0, 0]), num_columns + int(cut_off[0, 1])
            raise RuntimeError(
                f"labels must be whole items of {codes_per_item} codes before eos_token_id {eos}, "
                f"got {int(labels[b, n])} at {[b, n]} of the shape {list(labels.shape)}"
            )
    return codes[:, :num_columns]


def item_rows(layout: PaddedLayout, num_columns: int) -> TokenSelection | None:
    """The packed decoder rows in the order of whole items: of each of the first `num_columns` columns, user by user.

    Codes that a decoder mask hides have no row (-1). None: the packed rows are in this order.
    """
    batch, length = layout.mask.shape
    if num_columns == length:
        return layout.selection
    padded_row = torch.arange(batch * length, device=layout.mask.device)
    packed_row = padded_row
    if layout.selection is not None:
        packed_row, padded_row = layout.selection.indices, layout.selection.inverse
    user, column = padded_row // length, padded_row % length
    return TokenSelection(
        packed_row.view(batch, length)[:, :num_columns].flatten(),
        torch.arange(batch + 1, device=layout.mask.device, dtype=torch.int32) * num_columns,
        num_columns,
        torch.where(column < num_columns, user * num_columns + column, -1).to(torch.int32),
        len(padded_row),
    )


def global_target_counts(
    labels: Tensor,
    future_ids: Tensor | None = None,
    prediction: PredictionConfig | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The numbers of targets in the losses of all ranks together, as arguments of a stamped model's forward.

    Ranks that pack by a token budget have different numbers of sequences, and a mean of the ranks' means would weight
    the ranks equally. With these counts the losses of the ranks add up to the loss of the whole batch. If gradients are
    averaged over the ranks (DDP, FSDP2), multiply the loss by the number of ranks:

        counts = global_target_counts(batch["labels"], batch["future_ids"], prediction)
        loss = model(**batch, **counts).loss * dist.get_world_size()

    Costs one all-reduce of a few integers. Without a process group the counts are those of this batch. With gradient
    accumulation, add up the counts of the steps and give the sum to each step.

    Args:
        labels: int64 `[B, N]`, as given to the model; -100 where a decoder_attention_mask hides a position.
        future_ids, prediction: if the model predicts further steps, its future_ids and its configuration.
        group: the ranks that share the batch. None: all.

    Returns:
        `num_items_in_batch`, an int64 scalar. With prediction also `num_future_targets`, int64
        `[num_steps, codes_per_item]`.

    Raises:
        ValueError: only one of future_ids and prediction is given, or see `multi_step_targets`.
        RuntimeError: see `multi_step_targets`.
    """
    if (future_ids is None) != (prediction is None):
        missing = "future_ids" if future_ids is None else "prediction"
        raise ValueError(f"future_ids and prediction must be given together, got None for {missing}")
    counts = (labels != IGNORE_INDEX).sum()[None]
    if prediction is not None and future_ids is not None:
        has_target = multi_step_targets(labels, future_ids, prediction) != IGNORE_INDEX  # [B, N', K]
        of_columns = has_target.sum(0).view(-1, prediction.codes_per_item, prediction.num_steps)
        counts = torch.cat([counts, of_columns.sum(0).t().flatten()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts, group=group)
    result = {"num_items_in_batch": counts[0]}
    if prediction is not None:
        result["num_future_targets"] = counts[1:].view(prediction.num_steps, prediction.codes_per_item)
    return result
