"""Launches every CUDA C++ kernel on short, long and odd shapes, and few kernels of torch, for sanitizer.py.

python benchmarks/gpu/sanitized.py [--rehearse]
"""

import argparse

import torch
from correctness import SERVED_BY_A_LIBRARY
from rehearsal import shrunk
from workloads import CHECKED

from stamp_kernels.ops._library import served_by

DTYPES = (torch.bfloat16, torch.float32)
OPS = ("prune", "token_importance", "select_tokens", "gather_tokens_forward", "gather_tokens_backward")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rehearse", action="store_true")
    rehearse = parser.parse_args().rehearse
    device = torch.device("cpu" if rehearse else "cuda")
    servers = served_by("CPU" if rehearse else "CUDA")
    elsewhere = [op for op in OPS if servers[op] != "compiled"]
    if elsewhere:
        raise SystemExit(f"not served by the compiled library: {', '.join(elsewhere)}")
    for workload in CHECKED:
        if isinstance(workload, SERVED_BY_A_LIBRARY):
            for dtype in DTYPES:
                small = shrunk(workload) if rehearse else workload
                inputs = small.inputs(torch.device("cpu"), dtype)
                small.run({name: x.to(device) for name, x in inputs.items()})
                print(f"ran {workload.name} {dtype}", flush=True)


if __name__ == "__main__":
    main()
