"""Launches of kernels: a specialisation that was launched before goes straight to its compiled kernel.

Triton's own `kernel[grid](...)` binds the arguments, describes each of them and looks up the description, at every
call. `launch` looks up a key that takes less time to compute. It need not know what Triton makes of the arguments: the
first launch of a key is Triton's own, which returns the compiled kernel. The key only has to be as fine as Triton's:
two calls for which Triton compiles two kernels must have two keys. Triton 3.6 to 3.9 compiles for

- the device, the options of the launch (num_warps and so on), and some global settings;
- the value of a constexpr;
- the dtype of a tensor, and whether its address is a multiple of 16;
- the range of an int (32 bits, 64 bits or more) and, unless the kernel says do_not_specialize, whether the int is 1 and
  whether it is a multiple of 16;
- of everything else only the type.

A launch is Triton's own wherever anything else may matter: the kernel is interpreted, the GPU is not NVIDIA's, somebody
has replaced `JITFunction.run` (as `aot.compile_only` does) or set a hook (as profilers do), or an argument is none of
the above. Triton's check that no global variable of a kernel has changed runs only at the first launch of a key.
"""

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import jit
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, TensorWrapper

# Triton's own, unless it is replaced already.
_RUN = JITFunction.run if JITFunction.run.__globals__ is vars(jit) else None

# The global settings that Triton compiles for. The third one exists since 3.9.
_settings = operator.attrgetter(
    "runtime.debug",
    "compilation.instrumentation_mode",
    *(["compilation.fpsan_homomorphic_casts"] if hasattr(triton.knobs.compilation, "fpsan_homomorphic_casts") else []),
)


class _Compiled(NamedTuple):
    """A compiled kernel, and what its launch takes. It is kept because it unloads its code when it is freed."""

    kernel: CompiledKernel
    run: Callable[..., None]
    function: Any
    metadata: Any


def _function(num_parameters: int, items: Sequence[str]) -> Callable[..., tuple[Any, ...]]:
    """A function of x0, x1, ... that returns a tuple of the items.

    It is made from source code, as Triton makes what binds arguments, since loops would take twice the time.
    """
    parameters = ", ".join(f"x{i}" for i in range(num_parameters))
    function: Callable[..., tuple[Any, ...]] = eval(f"lambda {parameters}: ({''.join(f'{item}, ' for item in items)})")
    return function


class _Form(NamedTuple):
    """The launches of a kernel whose arguments have the same types.

    Attributes:
        key: of the members, what Triton compiles for besides their types.
        compiled: by that, and by what is no argument.
    """

    key: Callable[..., tuple[Hashable, ...]]
    compiled: dict[Hashable, _Compiled]


class _Layout(NamedTuple):
    """The launches of a kernel whose arguments are tuples of the same types and lengths, or none.

    Attributes:
        members: of the arguments that are no constexprs; those of tuples instead of the tuples.
        specialised: of each member, whether Triton may specialise the kernel on an int.
        forms: by the types of the members. None: Triton must know.
    """

    members: Callable[..., tuple[Any, ...]]
    specialised: list[bool]
    forms: dict[tuple[type, ...], _Form | None]

    def add_form(self, members: Sequence[Any], types: tuple[type, ...]) -> _Form | None:
        items = []
        for i, (member, specialised) in enumerate(zip(members, self.specialised, strict=True)):
            if isinstance(member, Tensor | TensorWrapper):
                items += [f"x{i}.dtype", f"x{i}.data_ptr() & 15"]
            elif type(member) is int:
                items.append(f"x{i} >> 31")  # 0 and -1 fit 32 bits, from 2^32 on it takes 64 without a sign
                if specialised:
                    items.append(f"1 if x{i} == 1 else -(x{i} & 15)")
            elif not (member is None or isinstance(member, bool | float)):
                return self.forms.setdefault(types, None)
        return self.forms.setdefault(types, _Form(_function(len(members), items), {}))


class _Call:
    """The launches of a kernel with the same names of arguments.

    Attributes:
        values: selects the arguments in the order of the kernel's parameters.
        constexprs, others, options: select the arguments that are constexprs, the others of the kernel, and options.
        layouts: by the types of `others` and the lengths of plain tuples among them.
    """

    def __init__(self, kernel: JITFunction, names: Sequence[str]) -> None:
        self.kernel = kernel
        parameters = [parameter.name for parameter in kernel.params]
        self.others_parameters = [parameter for parameter in kernel.params if not parameter.is_constexpr]
        self.values = _selection(parameters)
        self.constexprs = _selection([parameter.name for parameter in kernel.params if parameter.is_constexpr])
        self.others = _selection([parameter.name for parameter in self.others_parameters])
        self.options = _selection([name for name in names if name not in parameters])
        self.layouts: dict[tuple[type | int, ...], _Layout] = {}

    def add_layout(self, others: Sequence[Any], types: tuple[type | int, ...]) -> _Layout:
        items, specialised = [], []
        for i, (parameter, value) in enumerate(zip(self.others_parameters, others, strict=True)):
            if type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_fields")):
                items.append(f"*x{i}")
                specialised += [True] * len(value)  # whatever the parameter says
            else:
                items.append(f"x{i}")
                specialised.append(not parameter.do_not_specialize)
        return self.layouts.setdefault(types, _Layout(_function(len(others), items), specialised, {}))


_CALLS: dict[tuple[int, tuple[str, ...]], _Call] = {}  # by the kernel's id; a _Call keeps its kernel


def _selection(keys: Sequence[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """Selects the values of these keys or indices."""
    if len(keys) > 1:
        return operator.itemgetter(*keys)
    if keys:
        return lambda values: (values[keys[0]],)
    return lambda values: ()


def _is_watched(kernel: JITFunction) -> bool:
    """Whether somebody wants to know of launches, or to change what Triton compiles."""
    runtime = triton.knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(before, "calls", before)  # a chain of hooks, one hook, or None
        or getattr(after, "calls", after)
        or runtime.add_stages_inspection_hook
        or kernel.pre_run_hooks
    )


def launch(kernel: Any, grid: tuple[int, int, int], **arguments: Any) -> None:
    """`kernel[grid](**arguments)`, on the current stream of the current device.

    Args:
        kernel: a `triton.jit` function.
        arguments: all of the kernel's, and options of the launch, by name.
    """
    if JITFunction.run is not _RUN or type(kernel) is not JITFunction or _is_watched(kernel):
        kernel[grid](**arguments)
        return
    names = tuple(arguments)
    call = _CALLS.get((id(kernel), names))
    if call is None:
        if not set(kernel.arg_names) <= arguments.keys():  # an error, or default values
            kernel[grid](**arguments)
            return
        call = _CALLS.setdefault((id(kernel), names), _Call(kernel, names))
    others = call.others(arguments)
    types: tuple[type | int, ...] = tuple(map(type, others))
    if tuple in types:  # the type does not say how many members it has
        types += tuple([len(value) for value in others if type(value) is tuple])
    layout = call.layouts.get(types) or call.add_layout(others, types)
    members = layout.members(*others)
    member_types = tuple(map(type, members))
    form = layout.forms.get(member_types)
    if form is None:
        form = None if member_types in layout.forms else layout.add_form(members, member_types)
        if form is None:
            kernel[grid](**arguments)
            return
    active = driver.active
    device = active.get_current_device()
    key = (
        active, device, _settings(triton.knobs), call.options(arguments), call.constexprs(arguments), form.key(*members)
    )  # fmt: skip
    compiled = form.compiled.get(key)
    if compiled is not None:
        stream = active.get_current_stream(device)
        values = call.values(arguments)
        compiled.run(*grid, stream, compiled.function, compiled.metadata, None, None, None, *values)
        return
    first = kernel[grid](**arguments)
    if isinstance(first, CompiledKernel) and first.metadata.target.backend == "cuda":
        form.compiled[key] = _Compiled(first, first.run, first.function, first.packed_metadata)
