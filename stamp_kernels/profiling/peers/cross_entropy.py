"""What a user would run instead of `multi_token_cross_entropy`, each written at its best.

A peer is a function that takes a `CrossEntropyProblem` and gives the loss as a function of hidden and weight: the sum
over the steps of the mean over the rows. Targets are laid out beforehand and cost nothing. Where all steps share hidden
states and classes, those that torch's own functions make up compute one softmax for all targets; fused ones that take
one target per row run once for each step.
"""

import importlib
import inspect
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.profiling.peers.availability import PeerUnavailableError

# Logits of one chunk, but no fewer rows than CHUNK_ROWS: each chunk reads and writes the gradient of the whole weight.
# Measured on an AVX-512 core in float32, N = 4,096, from 128 to 4,096 rows: within 4 % of the best for D = 128 and V of
# 256, 1,024 and 4,096, and the best for V = 32,768 and for D = 512, V = 32,000. Unmeasured on a GPU: enough rows to
# fill it.
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}
CHUNK_ROWS = 512
RECOMPUTED_ROWS = 512  # the same of `chunked_recomputed`, whose chunks each make a gradient of the whole weight
CHILD_SECONDS = 60.0

LossFunction = Callable[[Tensor, Tensor], Tensor]


class SoftmaxShape(NamedTuple):
    """Logits as one peer's call makes them."""

    rows: int
    width: int
    classes: int
    dtype: torch.dtype


class Softmax(NamedTuple):
    """Logits that are computed once, and what is read from them.

    Attributes:
        hidden: `[N, D]`.
        weight: `[C, D]`, the rows of the step's classes.
        labels: int64 `[N, J]`, counted from the first of them: J steps that share these logits.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class CrossEntropyProblem:
    """The prediction of K targets per row, as every implementation is asked to solve it.

    Attributes:
        hidden: `[N, D]`, shared by the steps, or `[K, N, D]`.
        weight: `[V, D]`.
        targets: int64 `[N, K]`, absolute ids, all of them valid.
        codebook_sizes: rows of weight of each step's own classes, K parts of V in order; None: all rows for all steps.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    codebook_sizes: tuple[int, ...] | None = None

    @property
    def vocab_ranges(self) -> list[tuple[int, int]] | None:
        """The codebooks as `multi_token_cross_entropy` takes them."""
        if self.codebook_sizes is None:
            return None
        ends = torch.tensor(self.codebook_sizes).cumsum(0).tolist()
        return [(end - size, end) for end, size in zip(ends, self.codebook_sizes, strict=True)]

    @cached_property
    def labels(self) -> tuple[Tensor, ...]:
        """int64 `[N, J]` of each softmax."""
        if self.hidden.dim() == 2 and self.codebook_sizes is None:
            return (self.targets,)
        ranges = self.vocab_ranges or [(0, len(self.weight))] * self.targets.shape[1]
        return tuple((self.targets[:, k, None] - start).contiguous() for k, (start, _) in enumerate(ranges))

    def leaves(self) -> tuple[Tensor, Tensor]:
        """hidden and weight: new leaves that require a gradient."""
        return tuple(x.detach().clone().requires_grad_() for x in (self.hidden, self.weight))

    def softmaxes(self, hidden: Tensor, weight: Tensor) -> list[Softmax]:
        """What is computed once each.

        `unbind` and `split`, not slices, whose backward would fill a full-size gradient for every step.
        """
        num = len(self.labels)
        rows = hidden.unbind() if hidden.dim() == 3 else (hidden,) * num
        classes = (weight,) * num if self.codebook_sizes is None else weight.split(self.codebook_sizes)
        return [Softmax(*parts) for parts in zip(rows, classes, self.labels, strict=True)]

    def steps(self, hidden: Tensor, weight: Tensor) -> Iterator[Softmax]:
        """The same for functions that take one target per row: labels are `[N]`."""
        for softmax in self.softmaxes(hidden, weight):
            for labels in softmax.labels.unbind(1):
                yield softmax._replace(labels=labels)

    def shapes(self) -> list[SoftmaxShape]:
        """Of every softmax."""
        return [
            SoftmaxShape(*softmax.hidden.shape, len(softmax.weight), softmax.hidden.dtype)
            for softmax in self.softmaxes(self.hidden, self.weight)
        ]


def full_logits(problem: CrossEntropyProblem) -> LossFunction:
    """`F.cross_entropy(F.linear(...))`, step by step; of shared logits `log_softmax` is taken once."""

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        return sum(_sum_of_losses(*softmax) / len(softmax.labels) for softmax in problem.softmaxes(hidden, weight))

    return loss_of


def compiled_full_logits(problem: CrossEntropyProblem) -> LossFunction:
    """`full_logits` under `torch.compile`, for the shapes at hand."""
    torch.compiler.reset()  # each problem is compiled for itself; torch keeps a few versions of a function only
    _ = problem.labels  # laid out before torch.compile meets it, which cannot enter a cached_property's lock
    return torch.compile(full_logits(problem), fullgraph=True, dynamic=False)


def linear_cross_entropy(problem: CrossEntropyProblem) -> LossFunction:
    """`F.linear_cross_entropy` of torch 2.13 and later, in chunks: without options it is `full_logits`."""
    if not hasattr(F, "linear_cross_entropy"):
        raise PeerUnavailableError("F.linear_cross_entropy came with torch 2.13")

    def loss_of_step(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # Its own choice of rows, fewer the larger the vocabulary, is several times slower where D is 128.
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=_chunk_rows(weight), chunking_method=None)
        return F.linear_cross_entropy(x, weight, labels, options=options)

    return _step_by_step(problem, loss_of_step)


def chunked_recomputed(problem: CrossEntropyProblem) -> LossFunction:
    """Some rows at a time, whose logits the backward computes again."""

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=compute_dtype(hidden.dtype))
        for softmax in problem.softmaxes(hidden, weight):
            chunks = zip(softmax.hidden.split(RECOMPUTED_ROWS), softmax.labels.split(RECOMPUTED_ROWS), strict=True)
            for x, labels in chunks:
                total = total + checkpoint(_sum_of_losses, x, softmax.weight, labels, use_reentrant=False)
        return total / len(problem.targets)

    return loss_of


def chunked(problem: CrossEntropyProblem) -> LossFunction:
    """Some rows at a time, whose logits become their own gradient at once, in place."""
    return lambda hidden, weight: _ChunkedInForward.apply(hidden, weight, problem, _softmax_in_place)


def compiled_chunked(problem: CrossEntropyProblem) -> LossFunction:
    """`chunked` with what lies between the matrix products under `torch.compile`."""
    torch.compiler.reset()
    softmax_in_place = torch.compile(_softmax_in_place, fullgraph=True, dynamic=False)
    return lambda hidden, weight: _ChunkedInForward.apply(hidden, weight, problem, softmax_in_place)


def liger(problem: CrossEntropyProblem) -> LossFunction:
    """Liger's fused linear cross-entropy: chunks of rows, the weight's gradient summed in fp32."""
    package = _import_for_gpu("liger_kernel.transformers", problem)
    accum_dtype = compute_dtype(problem.hidden.dtype)
    fused = package.LigerFusedLinearCrossEntropyLoss(accum_dtype=accum_dtype)
    return _step_by_step(problem, lambda x, weight, labels: fused(weight, x, labels))


def cut_cross_entropy(problem: CrossEntropyProblem) -> LossFunction:
    """Apple's Cut Cross-Entropy: no logits, gradients added up under locks; first run in a child process.

    Without its gradient filter, which leaves out what is small: among random logits that is nearly everything. Sums in
    fp32 where the version at hand knows how.
    """
    package = _import_for_gpu("cut_cross_entropy", problem)
    probe_cut_cross_entropy(problem.shapes())
    for shape in problem.shapes():
        if _why_not_cut_cross_entropy[shape] is not None:
            raise PeerUnavailableError(_why_not_cut_cross_entropy[shape])
    return _step_by_step(problem, _cut_cross_entropy_of(package))


# By shape, as the child process found it; None: it came back.
_why_not_cut_cross_entropy: dict[SoftmaxShape, str | None] = {}


def probe_cut_cross_entropy(shapes: Sequence[SoftmaxShape], seconds: float = CHILD_SECONDS) -> None:
    """Let `cut_cross_entropy` know which shapes come back, those not yet known by one child process for all.

    Its kernels wait for each other's locks and have been seen to wait forever, which nothing can interrupt from within
    the process. Without this the peer finds out by itself, a process for every shape.

    Args:
        shapes: in the order in which they are tried.
        seconds: after which the process is killed; the shapes that it did not reach count as not coming back.
    """
    unknown = [shape for shape in dict.fromkeys(shapes) if shape not in _why_not_cut_cross_entropy]
    if not unknown:
        return
    arguments = [(*shape[:3], str(shape.dtype).removeprefix("torch.")) for shape in unknown]
    output, why_not = run_in_child(f"import {__name__} as peers; peers._try_cut_cross_entropy({arguments})", seconds)
    num_returned = output.count("returned")
    for i, shape in enumerate(unknown):
        returned = i < num_returned
        _why_not_cut_cross_entropy[shape] = None if returned else f"cut_cross_entropy in a process of its own {why_not}"


def run_in_child(code: str, seconds: float) -> tuple[str, str]:
    """What a Python process of its own wrote to stdout, and how it ended.

    A process that does not end in `seconds` is killed and not waited for: within a driver it may never die.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=errors)
        try:
            ending = f"ended with {child.wait(seconds)}"
        except subprocess.TimeoutExpired:
            child.kill()
            ending = f"did not come back within {seconds:g} s"
        output.seek(0)
        errors.seek(0)
        last_line = errors.read().strip().rpartition("\n")[2]
        return output.read(), f"{ending}: {last_line}" if last_line else ending


def _try_cut_cross_entropy(shapes: Sequence[tuple[int, int, int, str]]) -> None:
    """Forward and backward of every shape; says after each that it returned."""
    compute = _cut_cross_entropy_of(importlib.import_module("cut_cross_entropy"))
    for rows, width, classes, dtype in shapes:
        options = dict(device="cuda", dtype=getattr(torch, dtype), requires_grad=True)
        hidden, weight = torch.randn(rows, width, **options), torch.randn(classes, width, **options)
        compute(hidden, weight, torch.randint(classes, (rows,), device="cuda")).backward()
        torch.cuda.synchronize()
        print("returned", flush=True)


def _cut_cross_entropy_of(package: ModuleType) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    compute = package.linear_cross_entropy
    known = inspect.signature(compute).parameters  # version 25.1.1 sums in the tensors' own dtype
    options: dict[str, Any] = {name: True for name in ("accum_e_fp32", "accum_c_fp32") if name in known}
    return lambda x, weight, labels: compute(x, weight, labels, filter_eps=None, **options)


def _import_for_gpu(name: str, problem: CrossEntropyProblem) -> ModuleType:
    package = name.partition(".")[0]
    if problem.hidden.device.type != "cuda":
        raise PeerUnavailableError(f"{package} needs a GPU")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PeerUnavailableError(f"{package} is not installed, or not for this torch: {error}") from error


def _step_by_step(
    problem: CrossEntropyProblem, loss_of_step: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> LossFunction:
    return lambda hidden, weight: sum(loss_of_step(*step) for step in problem.steps(hidden, weight))


def _sum_of_losses(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Of all rows and of all J labels `[N, J]`."""
    logits = F.linear(x, weight)
    if labels.shape[1] == 1:
        return F.cross_entropy(logits, labels[:, 0], reduction="sum")
    return -logits.log_softmax(1).gather(1, labels).sum(dtype=compute_dtype(x.dtype))


def _softmax_in_place(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    """The loss, summed over rows and labels; `logits` become `scale` times the softmax."""
    wide = logits.to(compute_dtype(logits.dtype))  # no copy in fp32
    label_logits = wide.gather(1, labels)
    largest = wide.amax(1, keepdim=True)
    wide = wide.sub_(largest).exp_()
    total = wide.sum(1, keepdim=True)
    logits.copy_(wide.mul_(scale / total))
    return (total.log() + largest - label_logits).sum()


class _ChunkedInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, problem, softmax_in_place):
        scale = 1 / len(problem.targets)
        # Codebooks add up in the gradient of a hidden state that they share, chunks and steps in the weight's.
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight, dtype=compute_dtype(weight.dtype))
        total = grad_weight.new_zeros(())
        for softmax, grads in zip(
            problem.softmaxes(hidden, weight), problem.softmaxes(grad_hidden, grad_weight), strict=True
        ):
            rows, num_labels = _chunk_rows(softmax.weight), softmax.labels.shape[1]
            for x, labels, grad_x in zip(*(t.split(rows) for t in (*softmax[::2], grads.hidden)), strict=True):
                grad = F.linear(x, softmax.weight)
                total += softmax_in_place(grad, labels, scale * num_labels)
                grad.scatter_add_(1, labels, grad.new_full((), -scale).expand_as(labels))
                grad_x.addmm_(grad, softmax.weight)
                _add_product(grads.weight, grad.t(), x)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total * scale

    @staticmethod
    def backward(ctx, grad_loss):
        return *(x * grad_loss.to(x.dtype) for x in ctx.saved_tensors), None, None


def _chunk_rows(weight: Tensor) -> int:
    """A power of two, so that chunks are of one size where the batch's is one."""
    fitting = CHUNK_BYTES[weight.device.type] // (len(weight) * weight.itemsize)
    return 1 << (max(fitting, CHUNK_ROWS).bit_length() - 1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, in total's dtype where a matrix product can."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
