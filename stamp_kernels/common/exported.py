"""Result tuples and dataclasses that exported programs can take and return."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

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


def exported_dataclass(*, options: Sequence[str] = ()) -> Callable[[Cls], Cls]:
    """Decorates a dataclass, so that torch finds the tensors inside it (FSDP2, torch.func) and torch.export takes it.

    Its leaves are the fields that are not None, without the `options`. torch.export.register_dataclass would call the
    constructor, which refuses what tree_map puts into the fields.

    Args:
        options: fields with plain numbers that are part of the structure, as they are of a program.
    """

    def register(cls: Cls) -> Cls:
        fields = tuple(field.name for field in dataclasses.fields(cls))

        def names_of_leaves(x: Any) -> list[str]:
            return [name for name in fields if name not in options and getattr(x, name) is not None]

        def structure(x: Any, names: list[str]) -> list[list[Any]]:
            return [names, [getattr(x, name) for name in options]]

        def flatten(x: Any) -> tuple[list[Any], list[list[Any]]]:
            names = names_of_leaves(x)
            return [getattr(x, name) for name in names], structure(x, names)

        def flatten_with_keys(x: Any) -> tuple[list[tuple[pytree.KeyEntry, Any]], list[list[Any]]]:
            names = names_of_leaves(x)
            return [(pytree.GetAttrKey(name), getattr(x, name)) for name in names], structure(x, names)

        def unflatten(leaves: Iterable[Any], context: list[list[Any]]) -> Any:
            names, values = context
            given = dict(zip((*names, *options), (*leaves, *values), strict=True))
            x: Any = object.__new__(cls)
            for name in fields:
                object.__setattr__(x, name, given.get(name))  # the class may be frozen
            return x

        pytree.register_pytree_node(
            cls,
            flatten,
            unflatten,
            serialized_type_name=f"stamp_kernels.{cls.__name__}",
            flatten_with_keys_fn=flatten_with_keys,
        )
        # An exported program keeps its example inputs, and torch.export.load reads them with weights_only=True.
        torch.serialization.add_safe_globals([cls])
        return cls

    return register
