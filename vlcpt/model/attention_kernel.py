"""The attention of documents laid end to end: by a GPU's kernel that is proven there, or by PyTorch's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, groupby
from typing import Literal, NamedTuple

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vlcpt.model.timing import GAIN, median_seconds

logger = logging.getLogger(__name__)

# (query, key, value, bounds, longest, scaling, causal) -> output; tensors are (tokens, heads, width).
Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float | None, bool], torch.Tensor
]


class Proof(NamedTuple):
    """The kernel that is used on a device, or why none is.

    Args:
        reason: What was found of it.
        faster: Where PyTorch's own attention was measured to be faster. Documents of one length are one batch
            to it, as unpacked rows are, so that it may be faster for those alone.
    """

    kernel: Kernel | None
    reason: str
    faster: Literal["nowhere", "at equal lengths", "everywhere"] = "nowhere"


class Timing(NamedTuple):
    """Seconds of a layer's attention, forward and backward."""

    kernel: float
    plain: float

    def __str__(self) -> str:
        """Both times, that of the plain one first, as it is said where that one runs."""
        return f"{self.plain * 1e3:.3g} ms, and by torch.nn.attention.varlen {self.kernel * 1e3:.3g} ms"


def by_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    module: nn.Module,
    scaling: float | None,
    causal: bool,
    dropout: float = 0.0,
) -> torch.Tensor:
    """PyTorch's attention of each document, those of one length as one batch: (tokens, heads, width)."""
    runs = [(length, length * len(list(same))) for length, same in groupby(lengths)]
    together: dict[int, list[int]] = {}
    for number, (length, _) in enumerate(runs):
        together.setdefault(length, []).append(number)
    sizes = [size for _, size in runs]
    # A split would cost a copy in the backward pass, and is none where all have one length.
    parts = [one.split(sizes) if len(sizes) > 1 else (one,) for one in (query, key, value)]
    found: dict[int, torch.Tensor] = {}
    for length, numbers in together.items():
        # (n·length, heads, width) -> (n, heads, length, width); a single run is not copied.
        query, key, value = (
            (part[numbers[0]] if len(numbers) == 1 else torch.cat([part[number] for number in numbers]))
            .unflatten(0, (-1, length))
            .transpose(1, 2)
            for part in parts
        )
        out, _ = sdpa_attention_forward(
            module, query, key, value, None, dropout=dropout, scaling=scaling, is_causal=causal
        )
        parted = out.flatten(0, 1).split([sizes[number] for number in numbers])
        found.update(zip(numbers, parted, strict=True))
    return found[0] if len(runs) == 1 else torch.cat([found[number] for number in range(len(runs))])


# Documents of a pack, and windows of an image whose sides are no multiple of them: 4,096 and 4,736 tokens.
_PACK = (1024, 384, 640, 128, 896, 256, 512, 256)
_WINDOWS = (*([64] * 9), 16) * 8
_EQUAL = (2048, 2048)


@cache
def kernel_for(
    device: torch.device, dtype: torch.dtype, width: int, heads: int, group: int, causal: bool
) -> Proof:
    """The kernel, if it agrees with PyTorch's attention, forward and backward, and is no slower.

    Compared and measured once a process, in a moment. Each rank chooses for its own GPU: both agree to
    rounding, and no collective call depends on which of them runs.

    Args:
        dtype: In which attention is computed.
        width: The size of a head.
        heads: How many the queries have.
        group: Query heads to one head of keys.
        causal: Whether a token sees only those before it.
    """
    if device.type != "cuda":
        return Proof(None, "the kernel is for GPUs")
    if dtype not in (torch.bfloat16, torch.float16):
        return Proof(
            None, f"it computes in {str(dtype).removeprefix('torch.')}, and the kernel needs 16 bits"
        )
    try:
        kernel, wrong = _varlen_kernel(), ""
        # Over 128 tokens another library may serve the call, so longer documents are compared as well.
        for lengths in ((48, 16), (96, 160)):
            wrong = wrong or compare(kernel, lengths, device, dtype, width, group, causal)
    except torch.OutOfMemoryError:  # a full GPU says nothing of the kernel
        raise
    # Older cards and ROCm refuse with a RuntimeError, older releases of torch have other arguments or none.
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        wrong = f"it does not run: {(str(error) or repr(error)).splitlines()[0]}"
    if wrong:
        logger.warning(
            "attention by documents runs on PyTorch's own attention on %s, which is slower: "
            "torch.nn.attention.varlen is not used, because %s.",
            device,
            wrong,
        )
        return Proof(None, wrong)
    layer = (device, dtype, width, heads, group, causal)
    return _faster(kernel, *(measure(kernel, one, *layer) for one in (_PACK if causal else _WINDOWS, _EQUAL)))


def _faster(kernel: Kernel, unequal: Timing, equal: Timing) -> Proof:
    """The kernel, where PyTorch's attention is not clearly faster."""
    if unequal.plain * GAIN < unequal.kernel:
        return Proof(None, f"documents of unequal lengths take {unequal}", "everywhere")
    if equal.plain * GAIN < equal.kernel:
        return Proof(kernel, f"they take {equal}", "at equal lengths")
    return Proof(kernel, "torch.nn.attention.varlen agrees with PyTorch's attention")


def _varlen_kernel() -> Kernel:
    """``torch.nn.attention.varlen.varlen_attn`` (torch 2.14), for one set of bounds."""
    from torch.nn.attention.varlen import varlen_attn

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bounds: torch.Tensor,
        longest: int,
        scaling: float | None,
        causal: bool,
    ) -> torch.Tensor:
        out = varlen_attn(
            query,
            key,
            value,
            bounds,
            bounds,
            longest,
            longest,
            scale=scaling,
            window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(out, torch.Tensor)  # a pair only where more is asked for
        return out

    return attend


@torch.inference_mode(False)  # the first pass may be one without gradients
def compare(
    kernel: Kernel,
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    group: int,
    causal: bool,
) -> str:
    """What is wrong with a kernel: empty if its error is that of rounding.

    Two documents, forward and backward. The error is measured against float32; PyTorch's own attention in
    ``dtype`` says how large rounding makes it, and a kernel may be off by twice that.

    Args:
        lengths: Tokens of the documents.
        width: The size of a head.
        group: Query heads to one head of keys.
    """
    *inputs, upstream = _random_inputs(sum(lengths), 2 * group, group, width, device, dtype)
    scaling = width**-0.5

    def results(
        computed_in: torch.dtype, attend: Callable[..., torch.Tensor], *given: object
    ) -> list[torch.Tensor]:
        """Output and the gradients of the inputs, in float32."""
        with _apart(device):
            leaves = [one.detach().to(computed_in).requires_grad_() for one in inputs]
            out = attend(*leaves, *given, scaling, causal)
            grads = torch.autograd.grad(out, leaves, upstream.to(computed_in))
        return [one.float() for one in (out.detach(), *grads)]

    exact = results(torch.float32, by_length, lengths, _bare_layer(group))
    rounded = results(dtype, by_length, lengths, _bare_layer(group))
    found = results(dtype, kernel, _bounds(lengths, device), max(lengths))
    names = ("output", "gradient of the queries", "gradient of the keys", "gradient of the values")
    for name, right, near, one in zip(names, exact, rounded, found, strict=True):
        error = float((one - right).abs().max())
        allowed = 2 * float((near - right).abs().max()) + torch.finfo(dtype).eps * float(right.abs().max())
        if not error <= allowed:  # also where it is NaN
            return f"its {name} is off by {error:.2g}, where rounding explains {allowed:.2g}"
    return ""


@torch.inference_mode(False)
def measure(
    kernel: Kernel,
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    heads: int,
    group: int,
    causal: bool,
) -> Timing:
    """The time of a layer's attention to documents, by a kernel and by PyTorch's own.

    Args:
        lengths: Tokens of the documents.
        width: The size of a head.
        heads: How many the queries have.
        group: Query heads to one head of keys.
    """
    *inputs, upstream = _random_inputs(sum(lengths), heads, group, width, device, dtype)
    leaves = [one.requires_grad_() for one in inputs]

    def seconds(attend: Callable[..., torch.Tensor], *given: object) -> float:
        def work() -> None:
            torch.autograd.grad(attend(*leaves, *given, width**-0.5, causal), leaves, upstream)

        with _apart(device):
            return median_seconds(work, device)

    return Timing(
        kernel=seconds(kernel, _bounds(lengths, device), max(lengths)),
        plain=seconds(by_length, lengths, _bare_layer(group)),
    )


def _random_inputs(
    tokens: int, heads: int, group: int, width: int, device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Queries, keys, values, and a gradient of the output: (tokens, heads, width)."""
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    counts = (heads, heads // group, heads // group, heads)
    shapes = [(tokens, count, width) for count in counts]
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


def _bounds(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _bare_layer(group: int) -> nn.Module:
    """As much of a layer as PyTorch's attention asks for."""
    layer = nn.Module()
    vars(layer)["num_key_value_groups"] = group
    return layer


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Gradients and types of what is computed here are those of nothing around it."""
    with (
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        # Inside a layer whose activations are checkpointed, what is kept here is none of that layer's.
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ):
        yield
