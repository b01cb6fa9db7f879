"""What the autograd.Functions of the ops share: torch.func, vmap, and the refusal of second derivatives."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def loop_over_batch(function: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A vmap rule: one call of `function` for each example, whose results are stacked.

    The sequences of a packed batch are the batch of the ops, so another one in front of it is rare and not worth
    kernels. Results must have the same size for all examples.
    """

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        leaves, structure = pytree.tree_flatten(args)
        dims = pytree.tree_leaves(in_dims)

        def example(i: int) -> list[Any]:
            return [x if dim is None else x.select(dim, i) for x, dim in zip(leaves, dims, strict=True)]

        results = [function(*pytree.tree_unflatten(example(i), structure)) for i in range(info.batch_size)]
        stacked = pytree.tree_map(lambda *of_examples: torch.stack(of_examples), results[0], *results[1:])
        return stacked, pytree.tree_map(lambda _: 0, stacked)

    return rule


class OpFunction(torch.autograd.Function):
    """Base of the Functions around the ops. A subclass has `forward(*args)`, `setup_context` and `backward`.

    Together these let torch.func transform it. Nothing is computed in `setup_context`.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        # torch's own apply first inspects the signature of forward for defaults, which takes 40 us on every call.
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]  # torch's stubs lack it

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return loop_over_batch(cls.apply)(info, in_dims, *args)


def call_below_autograd(op: torch._ops.OpOverload, *args: Any) -> Any:
    """`op(*args)` for inputs of which none needs a gradient through this call, as inside an OpFunction.

    The op's Autograd kernel would only find that out, and a kernel in Python takes 10 us to call.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def first_order(public_name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates `backward(ctx, saved, *grads)` of an OpFunction, which autograd calls without `saved`.

    The backward runs without recording a graph. If one is asked for (create_graph=True), the gradients become part of
    the graph of all that they depend on, the incoming gradients and what was saved, and a derivative of them raises. So
    it does where a loss depends on them only in part: torch's `once_differentiable` leaves the gradients without a
    graph if no incoming gradient has one, and a gradient penalty would be dropped without a word.

    Args:
        public_name: for the message.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors  # read once, as activation checkpointing demands
            gradients: tuple[Tensor | None, ...]
            if not torch.is_grad_enabled():
                gradients = backward(ctx, saved, *grads)
                return gradients
            with torch.no_grad():
                gradients = backward(ctx, saved, *grads)
            # Not only those that require grad: of nested transforms of torch.func, the inner one does not say what the
            # outer ones differentiate.
            sources = [x for x in (*grads, *saved) if x is not None and x.is_floating_point()]
            present = [x for x in gradients if x is not None]
            linked = iter(_RefuseSecondOrder.apply(public_name, len(present), *present, *sources))
            return tuple(None if x is None else next(linked) for x in gradients)

        return run

    return decorate


class _RefuseSecondOrder(OpFunction):
    """The identity on gradients, as a function of what they depend on. Its derivative raises."""

    @staticmethod
    def forward(public_name: str, num_gradients: int, *gradients_and_sources: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in gradients_and_sources[:num_gradients])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.public_name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(
            f"stamp_kernels.{ctx.public_name} has derivatives of first order only: its gradients, which were computed "
            "with create_graph=True, cannot be differentiated again. use_backend('reference') has derivatives of every "
            "order"
        )


def without_repeats(*tensors: Any) -> tuple[Any, ...]:
    """The tensors (or None). Under torch.compile a second occurrence of a tensor is replaced by a view.

    torch.compile rejects an autograd.Function that gets the same tensor twice (such as keys that are the queries).
    """
    if not torch.compiler.is_compiling():
        return tensors
    distinct: list[Any] = []
    for x in tensors:
        if x is not None and any(x is y for y in distinct):
            x = x.view_as(x)
        distinct.append(x)
    return tuple(distinct)
