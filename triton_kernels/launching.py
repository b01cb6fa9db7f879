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
_dtype = operator.attrgetter("dtype")
_address = operator.methodcaller("data_ptr")


class _Compiled(NamedTuple):
    """A compiled kernel, and what its launch takes. It is kept because it unloads its code when it is freed."""

    kernel: CompiledKernel
    run: Callable[..., None]
    function: Any
    metadata: Any


class _Form:
    """The launches of a kernel whose arguments have the same types.

    Attributes:
        pointers, ints, specialised: select from the members those that are tensors, ints, and ints that Triton may
            specialise the kernel on.
        compiled: by what else Triton compiles for.
    """

    def __init__(self, pointers: Sequence[int], ints: Sequence[int], specialised: Sequence[int]) -> None:
        self.pointers, self.ints, self.specialised = map(_selection, (pointers, ints, specialised))
        self.compiled: dict[Hashable, _Compiled] = {}

    def key(self, members: Sequence[Any]) -> tuple[Hashable, ...]:
        """What Triton compiles for, of the members."""
        pointers = self.pointers(members)
        return (
            *map(_dtype, pointers),
            *[address & 15 for address in map(_address, pointers)],
            *[x >> 31 for x in self.ints(members)],  # 0 and -1 fit 32 bits, from 2^32 on it takes 64 without a sign
            *[1 if x == 1 else -(x & 15) for x in self.specialised(members)],
        )


class _Call:
    """The launches of a kernel with the same names of arguments.

    Attributes:
        values: selects the arguments in the order of the kernel's parameters.
        constexprs, others, options: select the arguments that are constexprs, the others of the kernel, and options.
        forms: by the types of `others`, the lengths of plain tuples among them, and the types of the members, which
            are those of tuples instead of the tuples. None: Triton must know.
    """

    def __init__(self, kernel: JITFunction, names: Sequence[str]) -> None:
        self.kernel = kernel
        parameters = [parameter.name for parameter in kernel.params]
        self.others_parameters = [parameter for parameter in kernel.params if not parameter.is_constexpr]
        self.values = _selection(parameters)
        self.constexprs = _selection([parameter.name for parameter in kernel.params if parameter.is_constexpr])
        self.others = _selection([parameter.name for parameter in self.others_parameters])
        self.options = _selection([name for name in names if name not in parameters])
        self.forms: dict[tuple[type | int, ...], _Form | None] = {}

    def add_form(self, others: Sequence[Any], types: tuple[type | int, ...]) -> _Form | None:
        pointers, ints, specialised = [], [], []
        position = 0
        for parameter, value in zip(self.others_parameters, others, strict=True):
            is_tuple = isinstance(value, tuple)
            for member in value if is_tuple else (value,):
                if isinstance(member, Tensor | TensorWrapper):
                    pointers.append(position)
                elif type(member) is int:
                    ints.append(position)
                    if is_tuple or not parameter.do_not_specialize:  # members of tuples are always specialised
                        specialised.append(position)
                elif not (member is None or isinstance(member, bool | float)):
                    return self.forms.setdefault(types, None)
                position += 1
        return self.forms.setdefault(types, _Form(pointers, ints, specialised))


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
    members: list[Any] = []
    lengths = []
    for value in others:
        if isinstance(value, tuple):
            members += value
            if type(value) is tuple:  # the type of others, NamedTuples, says how many members they have
                lengths.append(len(value))
        else:
            members.append(value)
    types = (*map(type, others), *lengths, *map(type, members))
    form = call.forms.get(types)
    if form is None:
        form = None if types in call.forms else call.add_form(others, types)
        if form is None:
            kernel[grid](**arguments)
            return
    active = driver.active
    device = active.get_current_device()
    key = (
        active, device, _settings(triton.knobs), call.options(arguments), call.constexprs(arguments), form.key(members)
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
