"""The `stamp` namespace of the dispatcher, and the only code that registers anything in it.

An op gets its schema, its fake (shapes for torch.compile) and its kernels here. The compiled libraries bring kernels
for the device they are named after, Triton serves CUDA otherwise, and the reference what is left.

On the CPU that is settled at import. On CUDA it is settled at the first call with CUDA tensors, so that importing the
package loads no CUDA library, asks no device anything and never fails because of either.
"""

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from stamp_kernels.ops._cuda_library import CudaChoice, choose_cuda_library, cuda_facts, load_cuda_library

# Held for the life of the process: a collected Library takes its ops with it.
_LIBRARY = torch.library.Library("stamp", "DEF")

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)

FLOP_FORMULAS: dict[torch._ops.OpOverloadPacket, Callable[..., int]] = {}

# The plain PyTorch kernels and the launchers, called with the arguments of the op's schema: without the device guard
# and the autocast guard that the dispatcher's kernels have.
REFERENCES: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
TRITON_LAUNCHERS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}

Server = Literal["compiled", "triton", "reference"]

_SERVED: dict[str, dict[str, Server]] = {"CPU": {}, "CUDA": {}}  # as far as it is settled
_CUDA_LOCK = threading.Lock()  # for the two that follow, and _SERVED["CUDA"]
_cuda_choice: CudaChoice | None = None  # None: not settled
_UNSETTLED_ON_CUDA: dict[str, Callable[..., Any]] = {}  # by op: the kernel if the compiled library has none


def _load_cpu_library() -> None:
    package = Path(__file__).resolve().parent.parent
    cpu_library = package / "_cpu.so"
    if not cpu_library.exists():
        raise ImportError(
            f"stamp_kernels has no compiled CPU library at {cpu_library}: install the package with "
            "`pip install --no-build-isolation .` (or `-e .`), which builds it"
        )
    torch.ops.load_library(str(cpu_library))


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"stamp::{name}", key)


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


def _naming_triton(op: torch._ops.OpOverload, launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Says what to install where the launcher cannot import Triton."""

    def run(*args: Any) -> Any:
        try:
            return launcher(*args)
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "triton":
                raise
            raise ImportError(_without_triton(op, error), name=error.name) from error

    return run


def _without_triton(op: torch._ops.OpOverload, error: ImportError) -> str:
    message = (
        f"{op} runs on Triton here, and Triton cannot be imported ({error}): install it with `pip install triton`, in "
        "the version that this torch was released with"
    )
    if _cuda_choice is not None and _cuda_choice.reason is not None:
        message += f". The compiled CUDA library does not serve: {_cuda_choice.reason}"
    return message


def _settle_cuda() -> None:
    """Decide who serves CUDA, unless that is done, and register the kernels.

    This may happen while a CUDA graph is captured: loading a library and reading a device's properties is work on the
    host, which a capture does not forbid. Several threads may call it at once: one settles, the others wait.
    """
    global _cuda_choice
    with _CUDA_LOCK:
        first = _cuda_choice is None
        choice = load_cuda_library(choose_cuda_library(cuda_facts())) if first else _cuda_choice
        for name, kernel in list(_UNSETTLED_ON_CUDA.items()):
            _SERVED["CUDA"][name] = _server_on_cuda(name)
            if not _has_kernel(name, "CUDA"):
                _LIBRARY.impl(name, kernel, "CUDA")
            del _UNSETTLED_ON_CUDA[name]
        _cuda_choice = choice
    if first and choice.reason is not None:  # after all is done: a warning may be an exception
        warnings.warn(
            f"stamp_kernels runs on Triton, not in its compiled CUDA library: {choice.reason}.",
            RuntimeWarning,
            stacklevel=3,
        )


def _server_on_cuda(name: str) -> Server:
    """Who serves an op as long as Triton's kernels are not registered."""
    if _has_kernel(name, "CUDA"):
        return "compiled"
    return "triton" if getattr(torch.ops.stamp, name).default in TRITON_LAUNCHERS else "reference"


def _settle_and_repeat(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The kernel of the first call with CUDA tensors, which settles who serves them and calls that.

    It is registered for CompositeExplicitAutograd, which is every device without a kernel of its own, and it stays
    registered. The dispatcher prefers a kernel for CUDA as soon as there is one, so later calls do not come here.
    A kernel registered for CUDA would have to be removed before the final one is registered, and a call from another
    thread in between would find no kernel.
    """

    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        key = keyset.highestPriorityTypeId()
        if key != torch._C.DispatchKey.CUDA:
            raise NotImplementedError(f"{op} has kernels for dense CPU and CUDA tensors, none for {key.name}")
        _settle_cuda()
        return op.redispatch(keyset, *args)

    return run


def served_by(key: Literal["CPU", "CUDA"]) -> dict[str, Server]:
    """Who serves each op on a device: its compiled library, Triton, or the reference.

    For CUDA before the first call: who will, by what is known now. That loads the compiled library if it will serve,
    initialises CUDA where there is a GPU, and does not warn.
    """
    if key == "CUDA":
        with _CUDA_LOCK:
            if _cuda_choice is None:
                load_cuda_library(choose_cuda_library(cuda_facts()))
            unsettled = {name: _server_on_cuda(name) for name in _UNSETTLED_ON_CUDA}
            return dict(sorted({**_SERVED["CUDA"], **unsettled}.items()))
    return dict(sorted(_SERVED[key].items()))


def _with_groups(
    op: torch._ops.OpOverload, groups: Sequence[type[tuple[Any, ...]]], function: Callable[..., Any]
) -> Callable[..., Any]:
    """`function` as the dispatcher calls it: with every argument of the schema, of which it takes some in groups."""
    if not groups:
        return function
    names = [argument.name for argument in op._schema.arguments]
    group_of_first = {group._fields[0]: group for group in groups}  # type: ignore[attr-defined]
    spans = []  # (start, end, group or None) of each argument of `function`
    start = 0
    while start < len(names):
        group = group_of_first.pop(names[start], None)
        end = start + 1 if group is None else start + len(group._fields)  # type: ignore[attr-defined]
        if group is not None and tuple(names[start:end]) != group._fields:  # type: ignore[attr-defined]
            raise TypeError(f"{op} has the arguments {names[start:end]} where {group.__name__} has {group._fields}")  # type: ignore[attr-defined]
        spans.append((start, end, group))
        start = end
    if group_of_first:
        raise TypeError(f"{op} has no argument {list(group_of_first)}")

    @functools.wraps(function)
    def grouped(*args: Any) -> Any:
        return function(*(args[i] if group is None else group(*args[i:j]) for i, j, group in spans))

    return grouped


def _register_flops(op: torch._ops.OpOverloadPacket, formula: Callable[..., int]) -> None:
    def count(*args: Any, out_val: Any = None) -> int:
        return formula(*args)

    count._get_raw = True  # type: ignore[attr-defined]  # formulas read cu_seqlens: tensors, not their shapes
    FLOP_FORMULAS[op] = count
    # Importing the counter imports Triton, too heavy for `import stamp_kernels`: stamp_kernels.flops does it.
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is not None:
        counter.flop_registry[op] = count


def define_op(
    schema: str,
    *,
    public_name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
    groups: Sequence[type[tuple[Any, ...]]] = (),
) -> torch._ops.OpOverload:
    """Register one op of the `stamp` namespace.

    Args:
        schema: name, arguments and returns, as torch.library takes them.
        public_name: the function of `stamp_kernels` that users call instead.
        reference: plain PyTorch kernel, for the CPU and CUDA where nothing else serves.
        triton: launcher of Triton kernels, which serves CUDA where no compiled kernel does.
        fake: the same arguments to outputs of the right shape, dtype and device, without contents.
        flops: FLOP formula, for torch.utils.flop_counter. None: no matrix product worth counting.
        groups: NamedTuples whose fields are arguments of the schema that follow one another. The four functions above
            take the schema's arguments in its order, those of a group as one argument.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op: torch._ops.OpOverload = getattr(torch.ops.stamp, name).default
    reference, fake = _with_groups(op, groups, reference), _with_groups(op, groups, fake)
    triton = None if triton is None else _with_groups(op, groups, triton)
    REFERENCES[op] = reference
    torch.library.register_fake(f"stamp::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, _guard_raw_call(op, public_name), "Autograd", with_keyset=True)
    _SERVED["CPU"][name] = "compiled" if _has_kernel(name, "CPU") else "reference"
    if not _has_kernel(name, "CPU"):
        _LIBRARY.impl(name, _outside_autocast(reference), "CPU")
    on_cuda = reference
    if triton is not None:
        TRITON_LAUNCHERS[op] = triton
        on_cuda = _on_device_of_first_tensor(_naming_triton(op, triton))
    _UNSETTLED_ON_CUDA[name] = _outside_autocast(on_cuda)
    _LIBRARY.impl(name, _settle_and_repeat(op), "CompositeExplicitAutograd", with_keyset=True)
    if flops is not None:
        _register_flops(getattr(torch.ops.stamp, name), _with_groups(op, groups, flops))
    return op


_load_cpu_library()
