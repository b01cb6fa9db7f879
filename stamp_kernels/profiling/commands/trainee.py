"""One configuration in training: its steps, its epochs and its metrics."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from stamp_kernels.profiling.commands.settings import WEIGHT_DECAY, CommonSettings
from stamp_kernels.profiling.commands.training_data import TrainingData
from stamp_kernels.profiling.data.batches import Batch, batches
from stamp_kernels.profiling.recommender.evaluate import evaluate
from stamp_kernels.profiling.recommender.recommender import build_recommender


class Trainee:
    """One configuration in training, from the weights of a seed.

    Args:
        name: of the configuration.
        settings: how it is trained.
        data: the data set; it also determines the size of the vocabulary.
        seed: of the weights, the order of the rows and dropout.

    Attributes:
        recommender: the model, in training mode.
        optimizer: its AdamW.
        losses: for each step so far, the loss of the next item without auxiliary terms: scalars on the device.
        tokens_per_block: for each step so far, see `RecommenderOutput`.
    """

    def __init__(self, name: str, settings: CommonSettings, data: TrainingData, seed: int) -> None:
        self.name = name
        self.settings = settings
        self.data = data
        self.seed = seed
        self.recommender = build_recommender(name, data.sizes(settings.model), seed=seed).to(settings.device).train()
        # Fused, as in Hugging Face's Trainer: a loop over the parameters would slow down every configuration's step.
        self.optimizer = torch.optim.AdamW(
            self.recommender.parameters(), lr=settings.learning_rate, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.losses: list[Tensor] = []  # on the device: reading one would be a sync in the step
        self.tokens_per_block: list[list[int]] = []

    def step(self, batch: Batch) -> None:
        """Forward, backward, optimizer, release of the gradients; `batch` is on the device."""
        # Dropout depends only on seed and step, not on the other configurations that run between two steps. The pair is
        # hashed to the 32 bits that torch's CPU generator reads of a seed: different pairs can have the same sum.
        torch.manual_seed(int(np.random.SeedSequence((self.seed, len(self.losses))).generate_state(1)[0]))
        with torch.autocast(self.settings.device.type, dtype=torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            output = self.recommender(batch)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(output.next_item_loss.detach())
        self.tokens_per_block.append(output.tokens_per_block)

    def train_epochs(self, on_step: Callable[[int, int], object]) -> list[float]:
        """Train for the settings' epochs; no step has been done before.

        Args:
            on_step: called after each step with the number of steps done and the number of all steps.

        Returns:
            The mean loss of each epoch, of the next item without auxiliary terms.

        Raises:
            RuntimeError: a mean loss is not finite.
        """
        settings = self.settings
        steps_per_epoch = len(self.data.training_set) // settings.batch_size
        losses = []
        for epoch in range(settings.epochs):
            for batch in batches_of_epoch(self.data, settings, self.seed, epoch):
                self.step(batch.to(settings.device))
                on_step(len(self.losses), settings.epochs * steps_per_epoch)
            losses.append(self.mean_loss(slice(-steps_per_epoch, None)))
        return losses

    def evaluate(self) -> dict[str, float]:
        """Metrics of the test split, without autocast."""
        settings = self.settings
        return evaluate(self.recommender, self.data.test_set, batch_size=settings.batch_size, device=settings.device)

    def mean_loss(self, steps: slice) -> float:
        """Mean of the losses of some steps.

        Raises:
            RuntimeError: it is not finite.
        """
        loss = torch.stack(self.losses[steps]).double().mean().item()
        if not math.isfinite(loss):
            raise RuntimeError(f"{self.name}: the mean training loss is {loss}")
        return loss

    def mean_tokens_per_block(self, steps: slice) -> list[int]:
        """Mean of the tokens that entered each block in some steps."""
        return [int(mean) for mean in np.mean(self.tokens_per_block[steps], axis=0).round()]


def batches_of_epoch(data: TrainingData, settings: CommonSettings, seed: int, epoch: int) -> Iterator[Batch]:
    """The batches of an epoch, on the CPU."""
    return batches(data.training_set, settings.batch_size, seed, settings.model.auxiliary_steps, epoch=epoch)
