"""The `stamp` namespace of the dispatcher. Only this file registers anything in it.

An op gets its schema, its fake (shapes for torch.compile) and its kernels here. The compiled library brings kernels for
the CPU, Triton serves CUDA, and the reference serves what they leave out. The first call with CUDA tensors imports
Triton; the import of the package does not.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from stamp_kernels.ops._autograd import loop_over_batch

# Kept for the life of the process: a Library that is garbage-collected removes its ops.
_LIBRARY = torch.library.Library("stamp", "DEF")

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)

FLOP_FORMULAS: dict[torch._ops.OpOverloadPacket, Callable[..., int]] = {}

# The plain PyTorch kernels and the launchers, which take the arguments of the op's schema and check them. They lack the
# device guard and the autocast guard of the dispatcher's kernels.
REFERENCES: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
TRITON_LAUNCHERS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}

Server = Literal["compiled", "triton", "reference"]

_SERVED: dict[str, dict[str, Server]] = {"CPU": {}, "CUDA": {}}


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


def _where_grad_is_required(op: torch._ops.OpOverload, serve: Callable[..., Any]) -> Callable[..., Any]:
    """An Autograd kernel that calls `serve` where a gradient would be lost, and otherwise the device's kernel."""

    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(x, torch.Tensor) and x.requires_grad
            for argument in args
            for x in (argument if isinstance(argument, list) else (argument,))
        ):
            return serve(*args)
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return run


def _refuse_second_order(op: torch._ops.OpOverload, public_name: str) -> Callable[..., Any]:
    def refuse(*args: Any) -> Any:
        raise RuntimeError(
            f"{op} is the backward of stamp_kernels.{public_name} and has no derivative, but one of its inputs "
            "requires grad: call it under torch.no_grad()"
        )

    return refuse


def _outside_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps autocast from torch's matrix products inside a kernel: the public functions have cast the inputs."""

    def run(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():  # the guard would exclude keys that are excluded
            return kernel(*args)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return kernel(*args)

    return run


def _on_device_of_first_tensor(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the tensors' device the current one, on which Triton launches."""

    def run(*args: Any) -> Any:
        first = args[0][0] if isinstance(args[0], list) else args[0]
        if first.is_cuda and first.get_device() == torch.cuda.current_device():
            return launcher(*args)
        with torch.cuda.device_of(first):
            return launcher(*args)

    return run


def _naming_triton(op: torch._ops.OpOverload, launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Says what to install if the launcher cannot import Triton."""

    def run(*args: Any) -> Any:
        try:
            return launcher(*args)
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "triton":
                raise
            raise ImportError(
                f"{op} runs on Triton on a GPU, and Triton cannot be imported ({error}): install it with `pip install "
                "triton`, in the version that this torch was released with",
                name=error.name,
            ) from error

    return run


def kernel_for_cuda(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """What serves an op for CUDA tensors: its Triton launcher if it has one, otherwise its reference."""
    launcher = TRITON_LAUNCHERS.get(op)
    if launcher is None:
        return _outside_autocast(REFERENCES[op])
    return _outside_autocast(_on_device_of_first_tensor(_naming_triton(op, launcher)))


def served_by(key: Literal["CPU", "CUDA"]) -> dict[str, Server]:
    """Who serves each op on a device: the compiled library, Triton, or the reference."""
    return dict(sorted(_SERVED[key].items()))


def _with_groups(
    op: torch._ops.OpOverload, groups: Sequence[type[tuple[Any, ...]]], function: Callable[..., Any]
) -> Callable[..., Any]:
    """`function`, which takes some arguments in groups, as the dispatcher calls it: with one argument after another."""
    if not groups:
        return function
    names = [argument.name for argument in op._schema.arguments]
    fields: dict[type[tuple[Any, ...]], tuple[str, ...]]
    fields = {group: group._fields for group in groups}  # type: ignore[attr-defined]  # of NamedTuples
    group_of_first = {of_group[0]: group for group, of_group in fields.items()}
    parameters = [f"x{i}" for i in range(len(names))]
    values = []  # of the arguments of `function`, as source code
    start = 0
    while start < len(names):
        group = group_of_first.pop(names[start], None)
        if group is None:
            values.append(parameters[start])
            start += 1
            continue
        end = start + len(fields[group])
        if tuple(names[start:end]) != fields[group]:
            raise TypeError(f"{op} has the arguments {names[start:end]} where {group.__name__} has {fields[group]}")
        values.append(f"new({group.__name__}, ({', '.join(parameters[start:end])},))")
        start = end
    if group_of_first:
        raise TypeError(f"{op} has no argument {list(group_of_first)}")
    # Source code, as namedtuple generates it, takes half the time of a loop over the groups at every call, and
    # `tuple.__new__(group, (...))` half the time of `group(...)`.
    source = f"lambda {', '.join(parameters)}: function({', '.join(values)})"
    scope = {"function": function, "new": tuple.__new__, **{group.__name__: group for group in groups}}
    return functools.wraps(function)(eval(source, scope))


def _checked(check: Callable[..., None], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` for arguments that `check` has let through."""

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        check(*args)
        return kernel(*args)

    return run


def imported_once(load: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """The launcher that `load` imports. It is imported at the first call: `import stamp_kernels` needs no Triton.

    An import statement in the launcher would take a microsecond at every call.
    """
    loaded = functools.cache(load)

    def launcher(*args: Any) -> Any:
        return loaded()(*args)

    return launcher


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
    check: Callable[..., None],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
    differentiable: Callable[..., Any] | None = None,
    backward_of: str | None = None,
    groups: Sequence[type[tuple[Any, ...]]] = (),
) -> torch._ops.OpOverload:
    """Register one op of the `stamp` namespace.

    Args:
        schema: name, arguments and returns, as torch.library takes them.
        check: raises a RuntimeError for arguments on which the kernels cannot rely, see `ops._boundary`. It runs before
            the reference and before the launcher; the compiled library has checks of its own.
        reference: plain PyTorch kernel, for the CPU and CUDA where nothing else serves.
        triton: launcher of Triton kernels, which serves CUDA.
        fake: the same arguments to outputs of the right shape, dtype and device, without contents.
        flops: FLOP formula, for torch.utils.flop_counter. None: no matrix product worth counting.
        differentiable: serves inputs that require grad, by the Function that the public function calls too. (A public
            function calls it directly, which is faster, and the op below it. A program that torch.export made calls
            the op, with parameters that require grad.) None: results have no gradient, as those of the public function.
        backward_of: the function of `stamp_kernels` whose backward the op is. Inputs that require grad raise, since a
            backward has no derivative.
        groups: NamedTuples whose fields are arguments of the schema that follow one another. The functions above take
            the schema's arguments in its order, those of a group as one argument.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op: torch._ops.OpOverload = getattr(torch.ops.stamp, name).default
    reference, fake = _with_groups(op, groups, _checked(check, reference)), _with_groups(op, groups, fake)
    triton = None if triton is None else _with_groups(op, groups, _checked(check, triton))
    REFERENCES[op] = reference
    torch.library.register_fake(f"stamp::{name}", fake, lib=_LIBRARY)
    if backward_of is not None:
        serve = _refuse_second_order(op, backward_of)
        _LIBRARY.impl(name, _where_grad_is_required(op, serve), "Autograd", with_keyset=True)
    elif differentiable is not None:
        serve = _with_groups(op, groups, differentiable)
        _LIBRARY.impl(name, _where_grad_is_required(op, serve), "Autograd", with_keyset=True)
    else:
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_vmap(f"stamp::{name}", loop_over_batch(op), lib=_LIBRARY)
    _SERVED["CPU"][name] = "compiled" if _has_kernel(name, "CPU") else "reference"
    if not _has_kernel(name, "CPU"):
        _LIBRARY.impl(name, _outside_autocast(reference), "CPU")
    _SERVED["CUDA"][name] = "reference" if triton is None else "triton"
    if triton is not None:
        TRITON_LAUNCHERS[op] = triton
    _LIBRARY.impl(name, kernel_for_cuda(op), "CUDA")
    if flops is not None:
        _register_flops(getattr(torch.ops.stamp, name), _with_groups(op, groups, flops))
    return op


# Internal, without tensors: see ops/_capability.py. Returns the name of the set that ran so far.
_LIBRARY.define("_use_cpu_capability(str name) -> str")
_load_cpu_library()
