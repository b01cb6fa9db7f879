"""Result tuples that exported programs can take and return."""

from typing import TypeVar

import torch
from torch.utils import _pytree as pytree

Cls = TypeVar("Cls", bound=type)


def exported(cls: Cls) -> Cls:
    """Decorates a NamedTuple, so that torch.export can save and load programs which take or return it.

    Torch asks for the name in the file. It reads a program's example inputs with weights_only=True.
    """
    pytree._register_namedtuple(cls, serialized_type_name=f"stamp_kernels.{cls.__name__}")
    torch.serialization.add_safe_globals([cls])
    return cls
