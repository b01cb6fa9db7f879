"""Where a training step's time goes, op by op, and what SAP's own ops take of it.

    python benchmarks/step_profile.py [--data FILE] [--configuration packed+sap] [--batch-size 128] [--steps 5]

The recommender, data and batches are those of `stamp-profile train`, timed by torch.profiler after a warm-up. SAP's own
ops are importance, selection, gather and its gradient; the centrality is part of the time of attention. On a GPU, times
are the device's, and the waits for the device are counted: a step should have none.
"""

import argparse
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from stamp_kernels.profiling.commands.settings import TrainSettings
from stamp_kernels.profiling.commands.training_data import prepare_data
from stamp_kernels.profiling.data.batches import batches
from stamp_kernels.profiling.data.interactions import load_interactions
from stamp_kernels.profiling.measure import describe_device, keep_freed_memory
from stamp_kernels.profiling.recommender.recommender import CONFIGURATIONS, build_recommender

WARMUP = 3
SAP_OPS = {
    f"stamp::{name}"
    for name in ("prune", "token_importance", "select_tokens", "gather_tokens_forward", "gather_tokens_backward")
}
WAITS = {"aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}


def profiled_steps(arguments: argparse.Namespace, device: torch.device) -> profile:
    """The profile of `arguments.steps` training steps, each on a batch of its own."""
    settings = TrainSettings(
        configurations=(arguments.configuration,), steps=arguments.steps, warmup=WARMUP,
        batch_size=arguments.batch_size, dtype="float32", device=device, seed=0, epochs=0, evaluate=False, max_items=30,
    )  # fmt: skip
    data = prepare_data(load_interactions(arguments.data), settings)
    recommender = build_recommender(arguments.configuration, data.sizes(settings.model), seed=0).to(device).train()
    optimizer = torch.optim.AdamW(recommender.parameters(), fused=True)
    epoch = batches(data.training_set, settings.batch_size, 0, settings.model.auxiliary_steps)

    def step() -> None:
        batch = next(epoch).to(device)
        recommender(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(WARMUP):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(arguments.steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return profiler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="data file (default: MovieLens-100K from recbole)")
    parser.add_argument("--configuration", choices=CONFIGURATIONS, default="packed+sap")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()

    events = profiled_steps(arguments, device).key_averages()
    on_gpu = device.type == "cuda"

    def own_ms(event: FunctionEventAvg) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / arguments.steps

    def whole_ms(event: FunctionEventAvg) -> float:
        return (event.device_time_total if on_gpu else event.cpu_time_total) / 1e3 / arguments.steps

    # On a GPU the kernels of an op are events too, some with "::" in their names, and would count twice.
    on_cpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    ops = [event for event in on_cpu if "::" in event.key and own_ms(event) > 0]
    step_ms = sum(own_ms(event) for event in ops)
    print(f"{arguments.configuration}, batch {arguments.batch_size}, {describe_device(device)}")
    print(f"{'op':<50}{'calls':>7}{'ms':>9}{'share':>8}   per step, without the ops that the op calls")
    for event in sorted(ops, key=own_ms, reverse=True)[:15]:
        calls, share = event.count / arguments.steps, own_ms(event) / step_ms
        print(f"{event.key:<50}{calls:>7.0f}{own_ms(event):>9.3f}{share:>8.1%}")
    print(f"{'all ops':<50}{'':>7}{step_ms:>9.3f}")
    sap = [event for event in on_cpu if event.key in SAP_OPS]
    sap_ms = sum(whole_ms(event) for event in sap)
    print(f"{'SAP: ' + ', '.join(sorted(event.key for event in sap)):<50}{'':>7}{sap_ms:>9.3f}{sap_ms / step_ms:>8.1%}")
    if on_gpu:
        waits = sum(event.count for event in events if event.key in WAITS) - 1  # the one at the end
        print(f"waits for the device: {waits}")


if __name__ == "__main__":
    main()
