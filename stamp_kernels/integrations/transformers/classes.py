"""Classes of stamped modules. A packed class goes below a module's own class, so that what a user overrides stays.

    class Mine(T5ForConditionalGeneration): ...   # super().forward in its forward reaches T5ForConditionalGeneration
    stamped_class(Mine, StampT5ForConditionalGeneration)  # its method resolution order: Mine, the stamped class, T5's

The class of a module is replaced in place: parameters, submodules and hooks are not touched.
"""

import dis
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

__all__ = [
    "StampedModule",
    "forget_forward",
    "lost_forward",
    "own_class",
    "packs",
    "patched_forward",
    "stamped_class",
]

_Class = TypeVar("_Class", bound=type)


class StampedModule(nn.Module):
    """Base of all packed classes.

    Attributes:
        stamp_own_class: for classes that `stamped_class` made or found: the class before stamping.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the module's own class: a class that was made here has no name to import."""
        own = vars(type(self)).get("stamp_own_class")
        if own is None:
            return super().__reduce_ex__(protocol)
        packed = next(cls for cls in type(self).__mro__ if _is_packed(cls))
        return _new, (own, packed), self.__dict__


def packs(own: type[nn.Module], *, named: str | None = None) -> Callable[[_Class], _Class]:
    """Decorator of a packed class, which takes the place of `own` and goes below its subclasses.

    `named` is its `__name__`, which `save_pretrained` writes into config.json.
    """

    def mark(packed: _Class) -> _Class:
        packed.stamp_own_class = own  # type: ignore[attr-defined]
        packed.stamp_is_packed = True  # type: ignore[attr-defined]
        packed.__name__ = named or packed.__name__
        return packed

    return mark


def _is_packed(cls: type) -> bool:
    return "stamp_is_packed" in vars(cls)


_DERIVED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def stamped_class(own: type[nn.Module], packed: type[nn.Module]) -> Any:
    """The class of a module of class `own` that runs packed. `packed` is a subclass of a base class of `own`."""
    if issubclass(own, packed):
        return own
    if vars(packed).get("stamp_own_class") is own:
        return packed
    if (own, packed) not in _DERIVED:
        attributes = dict(__module__=own.__module__, __qualname__=own.__qualname__, __doc__=own.__doc__)
        _DERIVED[own, packed] = type(own.__name__, (own, packed), {**attributes, "stamp_own_class": own})
    return _DERIVED[own, packed]


def own_class(cls: type[nn.Module]) -> Any:
    """The class of a module before stamping."""
    return vars(cls).get("stamp_own_class", cls)


def _new(own: type[nn.Module], packed: type[nn.Module]) -> Any:
    cls = stamped_class(own, packed)
    return cls.__new__(cls)


def lost_forward(own: type[nn.Module], base: type[nn.Module], unused: tuple[str, ...] = ()) -> str | None:
    """The first method of `own` that would be lost if a packed class were below it: a forward that does not call
    super().forward, or any override of the methods of `base` that the packed forward does not use.
    """
    for cls in own.__mro__[: own.__mro__.index(base)]:
        for name in () if _is_packed(cls) else ("forward", *unused):
            if name in vars(cls) and (name in unused or not _calls_super(vars(cls)[name], name)):
                return f"{cls.__name__}.{name}"
    return None


def patched_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own, for example from a hook of Accelerate."""
    return "forward" in vars(module) and not _is_that_of_its_class(module)


def forget_forward(module: nn.Module) -> None:
    """Delete a forward on the instance that is only that of its class, which Accelerate leaves behind when it removes a
    hook: it would stay if the class changes.
    """
    if "forward" in vars(module) and _is_that_of_its_class(module):
        del module.forward


def _is_that_of_its_class(module: nn.Module) -> bool:
    forward = vars(module)["forward"]
    is_same = getattr(forward, "__func__", None) is type(module).forward
    return is_same and forward.__self__ is module


def _calls_super(method: Any, name: str) -> bool:
    """Whether the first attribute that is read after some `super` is the method: `super().forward(...)`."""
    code = getattr(inspect.unwrap(method), "__code__", None)
    is_after_super = False
    for instruction in () if code is None else dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and instruction.argval == "super":
            is_after_super = True
        elif is_after_super and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            if instruction.argval == name:
                return True
            is_after_super = False
    return False
