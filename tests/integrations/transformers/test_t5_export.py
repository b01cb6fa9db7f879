"""torch.export of stamped T5s with a mask, as the base model is exported."""

import pytest
import torch
from closeness import relative_error
from t5_cases import PRUNING, padded_batch, stamped, tiny_t5
from torch import Tensor, nn

from stamp_kernels.integrations.transformers import PruningConfig
from stamp_kernels.integrations.transformers.padded_layout import _pack_at_capacity, pack_padded


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids)
        return self.model(**inputs, use_cache=False).logits


class Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        return self.model(**inputs, use_cache=False, skip_logits=True).loss


def arguments(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return batch["input_ids"], batch["attention_mask"], batch["labels"]


def exported(module: nn.Module, batch: dict[str, Tensor], strict: bool) -> nn.Module:
    users, length = torch.export.Dim("users", min=2, max=64), torch.export.Dim("length", min=4, max=512)
    shapes = ({0: users, 1: length}, {0: users, 1: length}, {0: users})
    return torch.export.export(module, arguments(batch), dynamic_shapes=shapes, strict=strict).module()


BATCHES = [padded_batch(), padded_batch((3, 9, 1), padding_side="left"), padded_batch((6, 6))]
CONFIGURATIONS = {
    "whole": dict(),
    "pruned": dict(pruning=PRUNING),
    "between ends": dict(pruning=PruningConfig([(1, 0.5)], protect_first=1, protect_last=1, min_keep=0)),
    "in their places": dict(pruning=PruningConfig([(1, 0.5), (2, 0.5)], layout="original")),
}


@pytest.mark.parametrize(
    ("name", "strict"),
    [("whole", False), ("whole", True), ("pruned", False), ("between ends", False), ("in their places", False)],
)
@torch.no_grad()
def test_an_exported_program_has_the_logits_of_the_model(name, strict):
    model = Logits(stamped(tiny_t5(attention="sdpa", num_layers=2), **CONFIGURATIONS[name])).eval()
    program = exported(model, BATCHES[0], strict)
    base = Logits(tiny_t5(attention="sdpa", num_layers=2)).eval()
    for batch in BATCHES:
        got = program(*arguments(batch))
        assert relative_error(got, model(*arguments(batch))) < 1e-5
        if "pruning" not in CONFIGURATIONS[name]:
            assert relative_error(got, base(*arguments(batch))) < 1e-5


@torch.no_grad()
def test_an_exported_loss_counts_no_padding():
    """The packed rows that are too many have no label."""
    model = Loss(stamped(tiny_t5(attention="sdpa", num_layers=2))).eval()
    program = exported(model, BATCHES[0], strict=False)
    for batch in BATCHES:
        assert relative_error(program(*arguments(batch)), model(*arguments(batch))) < 1e-5


@pytest.mark.parametrize("padding", ["right", "left", "holes", "empty"])
def test_packing_at_capacity_is_packing_with_tail_rows(padding):
    mask = torch.arange(9) < torch.tensor([4, 9, 1, 6])[:, None]
    if padding == "left":
        mask = mask.flip(1)
    elif padding == "holes":
        mask = mask & (torch.arange(9) % 3 != 1)
    elif padding == "empty":
        mask[1] = False
    inputs = torch.randn(4, 9, 8, requires_grad=True)
    packed, layout = pack_padded(inputs, mask)
    roomy, roomy_layout = _pack_at_capacity(inputs, mask)
    total = packed.values.shape[0]
    assert roomy.values.shape[0] == mask.numel()
    assert torch.equal(roomy.values[:total], packed.values) and torch.equal(roomy.cu_seqlens, packed.cu_seqlens)
    assert torch.equal(roomy.positions[:total], packed.materialized_positions())
    assert torch.equal(roomy_layout.pad(roomy.values), layout.pad(packed.values))
    labels = torch.randint(9, mask.shape)
    assert torch.equal(roomy_layout.pack(labels, -100)[:total], layout.pack(labels, -100))
    assert (roomy_layout.pack(labels, -100)[total:] == -100).all()
    weights = torch.randn_like(inputs)
    gradients = [
        torch.autograd.grad((each_layout.pad(each.values) * weights).sum(), inputs)[0]
        for each, each_layout in ((packed, layout), (roomy, roomy_layout))
    ]
    assert torch.equal(*gradients)
