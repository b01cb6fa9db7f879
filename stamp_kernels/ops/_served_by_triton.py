"""The public functions on the Triton launchers, for tensors of any device."""

from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from stamp_kernels.ops._library import TRITON_LAUNCHERS


class ServedByTriton(TorchDispatchMode):
    """Within the block, `torch.ops.stamp.*` run their Triton launcher instead of the kernel of the tensors' device.

    This is for tensors on the CPU, if Triton interprets its kernels, and for `meta` tensors, if it compiles them and
    launches nothing. The public functions, their autograd and whole models then reach the launchers as on a GPU.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        launcher = TRITON_LAUNCHERS.get(func)
        return func(*args, **(kwargs or {})) if launcher is None else launcher(*args)
