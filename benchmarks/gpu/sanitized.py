"""Launches every kernel of pruning on short, long and odd shapes, and few kernels of torch, for sanitizer.py.

python benchmarks/gpu/sanitized.py [--rehearse]
"""

import argparse

import torch
from rehearsal import shrunk
from workloads import CHECKED, Gather, ImportanceAndSelection, Prune

DTYPES = (torch.bfloat16, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rehearse", action="store_true")
    rehearse = parser.parse_args().rehearse
    device = torch.device("cpu" if rehearse else "cuda")
    for workload in CHECKED:
        if isinstance(workload, (Prune, Gather, ImportanceAndSelection)):
            for dtype in DTYPES:
                small = shrunk(workload) if rehearse else workload
                inputs = small.inputs(torch.device("cpu"), dtype)
                small.run({name: x.to(device) for name, x in inputs.items()})
                print(f"ran {workload.name} {dtype}", flush=True)


if __name__ == "__main__":
    main()
