"""What it takes to compile a kernel ahead of time, on a machine without a GPU."""

from typing import Any, NamedTuple

import torch
import triton

# Triton's names of the dtypes that q, k and v come in.
TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class AotVariant(NamedTuple):
    """One specialisation of a kernel, as a launcher would ask for it at run time.

    Attributes:
        name: unique within the module that yields it.
        signature: Triton's type of each argument that is not constant, such as "*bf16" or "i32". The launchers see to
            it that pointers are divisible by 16; strides are too in all but odd models.
        constexprs: value of each constant argument; None for tensors that are not given.
        options: num_warps and num_stages.
        hot: on the path that users train on: it must not spill, and must use the matrix units.
    """

    name: str
    kernel: triton.runtime.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]
    hot: bool
