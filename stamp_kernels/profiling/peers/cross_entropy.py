"""What a user would run instead of `multi_token_cross_entropy`, each written at its best.

A peer is a function that takes a `CrossEntropyProblem` and returns the loss as a function of hidden and weight: the sum
over the steps of the mean over the rows. Targets are prepared before and are not timed. If all steps share hidden
states and classes, the peers made of torch's own functions compute one softmax for all targets; fused peers that take
one target per row run once per step.
"""

import importlib
import inspect
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.profiling.peers.availability import PeerUnavailableError

# The logits of a row chunk take this many bytes, but it has at least MIN_ROW_CHUNK rows, since each chunk reads and
# writes the gradient of the whole weight. Measured on an AVX-512 core in float32, N = 4,096, from 128 to 4,096 rows:
# within 4 % of the best for D = 128 and V of 256, 1,024 and 4,096, and the best for V = 32,768 and for D = 512,
# V = 32,000. Not measured on a GPU, where it is enough rows to fill it.
ROW_CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}
MIN_ROW_CHUNK = 512
RECOMPUTED_ROW_CHUNK = 512  # rows in `chunked_recomputed`, where each chunk makes a gradient of the whole weight
CHILD_SECONDS = 60.0

LossFunction = Callable[[Tensor, Tensor], Tensor]


class SoftmaxShape(NamedTuple):
    """The sizes and dtype of one softmax, which decide how a peer's kernels run."""

    rows: int
    width: int
    classes: int
    dtype: torch.dtype


class Softmax(NamedTuple):
    """Logits that are computed once, and their targets.

    Attributes:
        hidden: `[N, D]`.
        weight: `[C, D]`, the rows of the step's classes.
        targets: int64 `[N, J]`, where 0 is the first of these classes: J steps share these logits.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor


@dataclass(frozen=True, eq=False)
class CrossEntropyProblem:
    """The prediction of K targets per row, the problem that every implementation solves.

    Attributes:
        hidden: `[N, D]`, shared by the steps, or `[K, N, D]`.
        weight: `[V, D]`.
        targets: int64 `[N, K]`, rows of weight, all of them valid.
        codebook_sizes: the number of classes of each step, K consecutive ranges of V. None: all V classes for all
            steps.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    codebook_sizes: tuple[int, ...] | None = None

    @property
    def vocab_ranges(self) -> list[tuple[int, int]] | None:
        """The codebooks in the form that `multi_token_cross_entropy` takes."""
        if self.codebook_sizes is None:
            return None
        return list(pairwise(accumulate(self.codebook_sizes, initial=0)))

    @cached_property
    def softmax_targets(self) -> tuple[Tensor, ...]:
        """For each softmax, its targets int64 `[N, J]`, see `Softmax`."""
        if self.hidden.dim() == 2 and self.codebook_sizes is None:
            return (self.targets,)
        ranges = self.vocab_ranges or [(0, len(self.weight))] * self.targets.shape[1]
        return tuple((self.targets[:, k, None] - start).contiguous() for k, (start, _) in enumerate(ranges))

    def leaves(self) -> tuple[Tensor, Tensor]:
        """hidden and weight: new leaves that require a gradient."""
        return self.hidden.detach().clone().requires_grad_(), self.weight.detach().clone().requires_grad_()

    def softmaxes(self, hidden: Tensor, weight: Tensor) -> list[Softmax]:
        """Each softmax once.

        It uses `unbind` and `split`, since the backward pass of each slice would fill a full-size gradient.
        """
        num_softmaxes = len(self.softmax_targets)
        rows = hidden.unbind() if hidden.dim() == 3 else (hidden,) * num_softmaxes
        classes = (weight,) * num_softmaxes if self.codebook_sizes is None else weight.split(self.codebook_sizes)
        return [Softmax(*each) for each in zip(rows, classes, self.softmax_targets, strict=True)]

    def steps(self, hidden: Tensor, weight: Tensor) -> Iterator[Softmax]:
        """The same for functions that take one target per row: targets are `[N]`."""
        for softmax in self.softmaxes(hidden, weight):
            for targets in softmax.targets.unbind(1):
                yield softmax._replace(targets=targets)

    def shapes(self) -> list[SoftmaxShape]:
        """Of every softmax."""
        return [
            SoftmaxShape(len(softmax.hidden), softmax.hidden.shape[1], len(softmax.weight), softmax.hidden.dtype)
            for softmax in self.softmaxes(self.hidden, self.weight)
        ]


def full_logits(problem: CrossEntropyProblem) -> LossFunction:
    """`F.cross_entropy(F.linear(...))` step by step; steps with shared logits share one `log_softmax`."""

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        losses = [_sum_of_losses(*softmax) / len(softmax.targets) for softmax in problem.softmaxes(hidden, weight)]
        return _sum(losses)

    return loss_of


def compiled_full_logits(problem: CrossEntropyProblem) -> LossFunction:
    """`full_logits` under `torch.compile`, for the shapes at hand."""
    torch.compiler.reset()  # every problem is compiled, and torch keeps only a few versions of a function
    _ = problem.softmax_targets  # computed here, because torch.compile cannot enter the lock of a cached_property
    return torch.compile(full_logits(problem), fullgraph=True, dynamic=False)


def linear_cross_entropy(problem: CrossEntropyProblem) -> LossFunction:
    """`F.linear_cross_entropy` of torch 2.13 and later, in row chunks: without options it is `full_logits`."""
    if not hasattr(F, "linear_cross_entropy"):
        raise PeerUnavailableError("F.linear_cross_entropy needs torch 2.13")

    def loss_of_step(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # Its own choice, fewer rows for larger vocabularies, is several times slower if D is 128.
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=_row_chunk(weight), chunking_method=None)
        loss: Tensor = F.linear_cross_entropy(x, weight, targets, options=options)
        return loss

    return _step_by_step(problem, loss_of_step)


def chunked_recomputed(problem: CrossEntropyProblem) -> LossFunction:
    """One row chunk at a time; the backward pass computes the logits again."""

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=compute_dtype(hidden.dtype))
        for softmax in problem.softmaxes(hidden, weight):
            row_chunks = zip(*(x.split(RECOMPUTED_ROW_CHUNK) for x in (softmax.hidden, softmax.targets)), strict=True)
            for x, targets in row_chunks:
                total = total + checkpoint(_sum_of_losses, x, softmax.weight, targets, use_reentrant=False)
        return total / len(problem.targets)

    return loss_of


def chunked(problem: CrossEntropyProblem) -> LossFunction:
    """One row chunk at a time; the forward pass turns the logits into their gradient, in place."""
    return lambda hidden, weight: _ChunkedInForward.apply(hidden, weight, problem, _softmax_in_place)


def compiled_chunked(problem: CrossEntropyProblem) -> LossFunction:
    """`chunked`, with `torch.compile` for everything between the matrix products."""
    torch.compiler.reset()
    softmax_in_place = torch.compile(_softmax_in_place, fullgraph=True, dynamic=False)
    return lambda hidden, weight: _ChunkedInForward.apply(hidden, weight, problem, softmax_in_place)


def liger(problem: CrossEntropyProblem) -> LossFunction:
    """Liger's fused linear cross-entropy: row chunks, and the weight's gradient summed in fp32."""
    package = _import_for_gpu("liger_kernel.transformers", problem)
    accum_dtype = compute_dtype(problem.hidden.dtype)
    fused = package.LigerFusedLinearCrossEntropyLoss(accum_dtype=accum_dtype)
    return _step_by_step(problem, lambda x, weight, targets: fused(weight, x, targets))


def cut_cross_entropy(problem: CrossEntropyProblem) -> LossFunction:
    """Apple's Cut Cross-Entropy: no logits in memory, gradients summed under locks; first run in a child process.

    Its gradient filter is off, because it leaves out small gradients, which nearly all are with random logits. It sums
    in fp32 if the installed version has that option.
    """
    package = _import_for_gpu("cut_cross_entropy", problem)
    probe_cut_cross_entropy(problem.shapes())
    for shape in problem.shapes():
        why_not = _why_not_cut_cross_entropy[shape]
        if why_not is not None:
            raise PeerUnavailableError(why_not)
    return _step_by_step(problem, _cut_cross_entropy_of(package))


# By shape, what went wrong in the child process; None: it returned.
_why_not_cut_cross_entropy: dict[SoftmaxShape, str | None] = {}


def probe_cut_cross_entropy(shapes: Sequence[SoftmaxShape], seconds: float = CHILD_SECONDS) -> None:
    """Find out for which shapes `cut_cross_entropy` returns; one child process tries all that are not known yet.

    Its kernels wait for each other's locks and have been seen to wait forever, which nothing inside the process can
    interrupt. If this was not called before, the peer starts a process for every shape.

    Args:
        shapes: in the order in which they are tried.
        seconds: after this time the process is killed; the shapes that it did not reach count as not returning.
    """
    unknown = [shape for shape in dict.fromkeys(shapes) if shape not in _why_not_cut_cross_entropy]
    if not unknown:
        return
    arguments = [(*shape[:3], str(shape.dtype).removeprefix("torch.")) for shape in unknown]
    output, why_not = run_in_child(f"import {__name__} as peers; peers._try_cut_cross_entropy({arguments})", seconds)
    num_returned = output.count("returned")
    for i, shape in enumerate(unknown):
        returned = i < num_returned
        _why_not_cut_cross_entropy[shape] = None if returned else f"cut_cross_entropy in a child process {why_not}"


def run_in_child(code: str, seconds: float) -> tuple[str, str]:
    """Run Python code in a child process.

    A process that does not end in `seconds` is killed but not waited for: inside a driver call it may never die.

    Returns:
        What it wrote to stdout, and how it ended.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=errors)
        try:
            ending = f"ended with {child.wait(seconds)}"
        except subprocess.TimeoutExpired:
            child.kill()
            ending = f"did not return within {seconds:g} s"
        output.seek(0)
        errors.seek(0)
        last_line = errors.read().strip().rpartition("\n")[2]
        return output.read(), f"{ending}: {last_line}" if last_line else ending


def _try_cut_cross_entropy(shapes: Sequence[tuple[int, int, int, str]]) -> None:
    """Forward and backward for every shape; prints after each that it returned."""
    compute = _cut_cross_entropy_of(importlib.import_module("cut_cross_entropy"))
    for rows, width, classes, dtype in shapes:
        options: dict[str, Any] = dict(device="cuda", dtype=getattr(torch, dtype), requires_grad=True)
        hidden, weight = torch.randn(rows, width, **options), torch.randn(classes, width, **options)
        compute(hidden, weight, torch.randint(classes, (rows,), device="cuda")).backward()
        torch.cuda.synchronize()
        print("returned", flush=True)


def _cut_cross_entropy_of(package: ModuleType) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    compute = package.linear_cross_entropy
    known = inspect.signature(compute).parameters  # version 25.1.1 sums in the tensors' own dtype
    options: dict[str, Any] = {name: True for name in ("accum_e_fp32", "accum_c_fp32") if name in known}
    return lambda x, weight, targets: compute(x, weight, targets, filter_eps=None, **options)


def _import_for_gpu(name: str, problem: CrossEntropyProblem) -> ModuleType:
    package = name.partition(".")[0]
    if problem.hidden.device.type != "cuda":
        raise PeerUnavailableError(f"{package} needs a GPU")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PeerUnavailableError(f"{package} is not installed, or does not fit this torch: {error}") from error


def _step_by_step(
    problem: CrossEntropyProblem, loss_of_step: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> LossFunction:
    return lambda hidden, weight: _sum([loss_of_step(*step) for step in problem.steps(hidden, weight)])


def _sum(losses: Sequence[Tensor]) -> Tensor:
    return sum(losses[1:], start=losses[0])


def _sum_of_losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss, summed over the rows and the J targets of each, `[N, J]`."""
    logits = F.linear(x, weight)
    if targets.shape[1] == 1:
        return F.cross_entropy(logits, targets[:, 0], reduction="sum")
    return -logits.log_softmax(1).gather(1, targets).sum(dtype=compute_dtype(x.dtype))


def _softmax_in_place(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """The loss, summed over rows and targets; `logits` become `scale` times the softmax."""
    wide = logits.to(compute_dtype(logits.dtype))  # no copy in fp32
    target_logits = wide.gather(1, targets)
    largest = wide.amax(1, keepdim=True)
    wide = wide.sub_(largest).exp_()
    total = wide.sum(1, keepdim=True)
    logits.copy_(wide.mul_(scale / total))
    return (total.log() + largest - target_logits).sum()


class _ChunkedInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        problem: CrossEntropyProblem,
        softmax_in_place: Callable[[Tensor, Tensor, float], Tensor],
    ) -> Tensor:
        scale = 1 / len(problem.targets)
        # Codebooks add up in the gradient of shared hidden states; row chunks and steps add up in the weight's.
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight, dtype=compute_dtype(weight.dtype))
        total = grad_weight.new_zeros(())
        for softmax, grads in zip(
            problem.softmaxes(hidden, weight), problem.softmaxes(grad_hidden, grad_weight), strict=True
        ):
            rows, num_targets = _row_chunk(softmax.weight), softmax.targets.shape[1]
            row_chunks = (x.split(rows) for x in (softmax.hidden, softmax.targets, grads.hidden))
            for x, targets, grad_x in zip(*row_chunks, strict=True):
                grad = F.linear(x, softmax.weight)  # logits, which the next two lines turn into their gradient
                total += softmax_in_place(grad, targets, scale * num_targets)
                grad.scatter_add_(1, targets, grad.new_full((), -scale).expand_as(targets))
                grad_x.addmm_(grad, softmax.weight)
                _add_product(grads.weight, grad.t(), x)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total * scale

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = (x * grad_loss.to(x.dtype) for x in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None


def _row_chunk(weight: Tensor) -> int:
    """Rows per chunk, a power of two, so that all chunks have the same size if the batch is a power of two."""
    fitting = ROW_CHUNK_BYTES[weight.device.type] // (len(weight) * weight.itemsize)
    return 1 << (max(fitting, MIN_ROW_CHUNK).bit_length() - 1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, summed in total's dtype if the matrix product can do that."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
