"""The `stamp` namespace of the dispatcher, and the only code that registers anything in it.

An op gets its schema, its fake (shapes for torch.compile) and its kernels here. The compiled libraries bring kernels
for the device they are named after, Triton serves CUDA otherwise, and the reference what is left.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Held for the life of the process: a collected Library takes its ops with it.
_LIBRARY = torch.library.Library("stamp", "DEF")

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)

FLOP_FORMULAS: dict[torch._ops.OpOverloadPacket, Callable[..., int]] = {}


def _load_compiled_libraries() -> None:
    package = Path(__file__).resolve().parent.parent
    cpu_library = package / "_cpu.so"
    if not cpu_library.exists():
        raise ImportError(
            f"stamp_kernels has no compiled CPU library at {cpu_library}: install the package with "
            "`pip install --no-build-isolation .` (or `-e .`), which builds it"
        )
    torch.ops.load_library(str(cpu_library))
    cuda_library = package / "_cuda.so"
    # The symbols it needs exist only in a CUDA build of torch.
    if torch.version.cuda is not None and cuda_library.exists():
        torch.ops.load_library(str(cuda_library))


def _guard_raw_call(op: torch._ops.OpOverload, public_name: str) -> Callable[..., Any]:
    """An Autograd kernel that refuses what would lose a gradient, and otherwise goes on to the device's kernel."""

    def refuse_grad(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled():
            for argument in args:
                tensors = argument if isinstance(argument, list) else (argument,)
                if any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors):
                    raise RuntimeError(
                        f"{op} is a raw op without autograd and one of its inputs requires grad: "
                        f"call stamp_kernels.{public_name}, or call the op under torch.no_grad()"
                    )
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return refuse_grad


def _outside_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The public functions have cast the inputs; autocast must not reach torch's products inside a kernel."""

    def run(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return kernel(*args)

    return run


def _on_device_of_first_tensor(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the tensors."""

    def run(*args: Any) -> Any:
        first = args[0][0] if isinstance(args[0], list) else args[0]
        with torch.cuda.device_of(first):
            return launcher(*args)

    return run


def define_op(
    schema: str,
    *,
    public_name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> torch._ops.OpOverload:
    """Register one op of the `stamp` namespace.

    Args:
        schema: name, arguments and returns, as torch.library takes them.
        public_name: the function of `stamp_kernels` that users call instead.
        reference: plain PyTorch kernel with the schema's arguments, for the devices without a compiled one.
        triton: launcher of Triton kernels with the schema's arguments, which serves CUDA where no compiled kernel does.
        fake: the same arguments to outputs of the right shape, dtype and device, without contents.
        flops: FLOP formula with the schema's arguments and `out_val`, for torch.utils.flop_counter. None: no
            matrix product worth counting.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op: torch._ops.OpOverload = getattr(torch.ops.stamp, name).default
    torch.library.register_fake(f"stamp::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, _guard_raw_call(op, public_name), "Autograd", with_keyset=True)
    otherwise = {"CPU": _outside_autocast(reference), "CUDA": _outside_autocast(reference)}
    if triton is not None:
        otherwise["CUDA"] = _outside_autocast(_on_device_of_first_tensor(triton))
    for key, kernel in otherwise.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"stamp::{name}", key):
            _LIBRARY.impl(name, kernel, key)
    if flops is not None:
        flops._get_raw = True  # the formula reads cu_seqlens, so it wants tensors where torch would pass shapes
        FLOP_FORMULAS[getattr(torch.ops.stamp, name)] = flops
        # Importing the counter imports Triton, too heavy for `import stamp_kernels`: stamp_kernels.flops does it.
        counter = sys.modules.get("torch.utils.flop_counter")
        if counter is not None:
            counter.flop_registry[getattr(torch.ops.stamp, name)] = flops
    return op


_load_compiled_libraries()
