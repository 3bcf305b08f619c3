"""The parts of ``gpu.py`` that need no model: attention, the loss, the patch embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from gpu_machine import Findings, device, peak, rounded, seconds
from torch import nn


@dataclass(frozen=True)
class Shapes:
    """What is computed.

    Args:
        lengths: Documents of a pack.
        frames: Patches of the images of a pack.
        window: Patches of a window.
        heads, key_heads, width: Of the language model's attention.
        vision_heads, vision_width: Of the vision tower's.
        hidden, vocabulary: Of the output layer.
        targets: Of a pack, several numbers of them.
        patch: The patch embedding's weight.
        patches: That are embedded at once.
    """

    lengths: Sequence[int] = (2439, 1311, 2026, 87, 943, 1386)  # 8,192
    frames: Sequence[int] = (2436,) * 6
    window: int = 64
    heads: int = 16
    key_heads: int = 2
    width: int = 128
    vision_heads: int = 16
    vision_width: int = 80
    hidden: int = 2048
    vocabulary: int = 151_936
    targets: Sequence[int] = (400, 1600, 6400)
    patch: tuple[int, ...] = (1280, 3, 2, 14, 14)
    patches: Sequence[int] = (2048, 14_616)


TINY = Shapes(
    lengths=(48, 16, 64), frames=(64, 64), window=16, heads=4, key_heads=2, width=16, vision_heads=2,
    vision_width=16, hidden=32, vocabulary=512, targets=(40,), patch=(32, 3, 2, 14, 14), patches=(64,),
)  # fmt: skip
CHUNKS = (128, 512, 2048)


# --- attention ---


def attention(findings: Findings, shapes: Shapes) -> None:
    """Which kernels run, whether they are right, and what they cost."""
    dtype, where = torch.bfloat16, device()
    with findings.proving("which kernels a run uses"):
        from vlcpt.model.attention import attend_by_document, describe_kernels

        model = _published()
        attend_by_document(model)
        said = describe_kernels(model, where, dtype)
        findings.note("kernels of a run", said or "PyTorch's own attention, a document at a time")
    windows = [shapes.window] * (sum(shapes.frames) // shapes.window)
    layers = {
        "language model": (shapes.lengths, shapes.heads, shapes.key_heads, shapes.width, True),
        "vision tower, frames": (shapes.frames, shapes.vision_heads, None, shapes.vision_width, False),
        "vision tower, windows": (windows, shapes.vision_heads, None, shapes.vision_width, False),
    }
    for name, (lengths, heads, key_heads, width, causal) in layers.items():
        with findings.proving(f"attention of the {name}"):
            _attention_layer(findings, name, lengths, heads, key_heads or heads, width, causal)


def _attention_layer(
    findings: Findings,
    name: str,
    lengths: Sequence[int],
    heads: int,
    key_heads: int,
    width: int,
    causal: bool,
) -> None:
    """One kind of layer: the kernel against PyTorch's attention document by document."""
    from vlcpt.model.attention_kernel import by_length, compare, kernel_for

    where, dtype = device(), torch.bfloat16
    layer = nn.Module()
    vars(layer)["num_key_value_groups"] = heads // key_heads
    inputs = [
        torch.randn(sum(lengths), count, width, device=where, dtype=dtype, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    ]
    upstream = torch.randn(sum(lengths), heads, width, device=where, dtype=dtype)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=where)
    scaling = width**-0.5

    def run(attend: Callable[..., torch.Tensor], *given: object) -> Callable[[], object]:
        def work() -> object:
            return torch.autograd.grad(attend(*inputs, *given, scaling, causal), inputs, upstream)

        return work

    plain = run(by_length, lengths, layer)
    found: dict[str, object] = {
        "documents": len(lengths),
        "tokens": sum(lengths),
        "one by one": rounded({"seconds": seconds(plain), "bytes": peak(plain)}),
    }
    proof = kernel_for(where, dtype, width, heads, heads // key_heads, causal)
    if proof.faster != "nowhere":
        found[f"a run takes PyTorch's attention {proof.faster}"] = proof.reason
    if proof.kernel is None:
        findings.note(name, found)
        if proof.faster == "everywhere":  # measured, so nothing is left to prove
            return
        findings.unproven(f"the varlen kernel in the {name}", proof.reason)
        return
    wrong = compare(proof.kernel, lengths, where, dtype, width, heads // key_heads, causal)
    found["varlen agrees, forward and backward"] = not wrong
    if wrong:
        found["varlen is wrong"] = wrong
    kernel = run(proof.kernel, bounds, max(lengths))
    found["varlen"] = rounded({"seconds": seconds(kernel), "bytes": peak(kernel)})
    found["times faster"] = round(seconds(plain) / seconds(kernel), 2)
    findings.note(name, found)


def _published() -> nn.Module:
    """The published configuration without weights: describing kernels needs shapes alone."""
    from shapes_3b import TEXT, VISION
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True)
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config)


# --- the loss ---


def loss(findings: Findings, shapes: Shapes) -> None:
    """The loss of a frozen head and of one that trains, by every method, at several numbers of targets."""
    for head in ("frozen", "trained"):
        for count in shapes.targets:
            with findings.proving(f"the loss, {head} head, {count} targets"):
                found = _loss_of(findings, head, count, shapes)
                findings.note(f"{head} head, {count} targets", found)


def _loss_of(findings: Findings, head: str, count: int, shapes: Shapes) -> dict[str, object]:
    """Seconds, bytes and errors of each method; the fastest that is right."""
    where, dtype = device(), torch.bfloat16
    # Masters are float32, and autocast computes in bfloat16.
    held = torch.float32 if head == "trained" else dtype
    layer = nn.Linear(shapes.hidden, shapes.vocabulary, bias=False, device=where, dtype=held)
    with torch.no_grad():
        layer.weight.normal_(std=0.02)
    layer.requires_grad_(head == "trained")
    hidden = torch.randn(count, shapes.hidden, device=where, dtype=dtype, requires_grad=True)
    ids = torch.randint(shapes.vocabulary, (count,), device=where)
    leaves = [hidden, *(one for one in layer.parameters() if one.requires_grad)]
    exact = _gradients(lambda: _in_float32(layer, hidden, ids), leaves)
    methods: dict[str, dict[str, object]] = {}
    for name, method in _methods(layer, hidden, ids, dtype, sum(shapes.lengths)).items():
        with findings.proving(f"{name}, {head} head, {count} targets"):
            methods[name] = _measured(method, leaves, exact)
    # Rounding to 8 bits of mantissa, in sums: the plain method says how much.
    allowed = 2 * float(str(methods["logits at once"]["off"])) + 1e-3 if "logits at once" in methods else 2e-2
    right = {name: one for name, one in methods.items() if float(str(one["off"])) <= allowed}
    fastest = min(right, key=lambda name: float(str(right[name]["seconds"])), default=None)
    return {"methods": methods, "fastest that is right": fastest}


def _methods(
    layer: nn.Linear, hidden: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype, tokens: int
) -> Mapping[str, Callable[[], torch.Tensor]]:
    """The methods by name, each of which gives the mean over the targets of a pack of ``tokens``."""
    functional = nn.functional
    where = hidden.device.type

    def at_once() -> torch.Tensor:
        with torch.autocast(where, dtype):
            return functional.cross_entropy(layer(hidden).float(), ids)

    def in_chunks(chunk: int) -> Callable[[], torch.Tensor]:
        def work() -> torch.Tensor:
            from vlcpt.training.loss import chunked_nll

            with torch.autocast(where, dtype):
                return chunked_nll(layer, hidden, ids, chunk, layer.forward).mean()

        return work

    def of_torch(chunk: int | None) -> Callable[[], torch.Tensor]:
        def work() -> torch.Tensor:
            # torch 2.14; older releases have none, which is then unproven.
            options = nn.LinearCrossEntropyOptions(**({} if chunk is None else _fixed(chunk)))
            weight = layer.weight.to(dtype)
            # Each target has a weight of its own, so that the mean of torch's is of no use.
            found = functional.linear_cross_entropy(hidden, weight, ids, options=options, reduction="none")
            return found.float().mean()

        return work

    def everywhere() -> torch.Tensor:
        others = tokens - len(ids)
        states = torch.cat([hidden, hidden.new_zeros(others, hidden.shape[1])])
        with torch.autocast(where, dtype):
            return functional.cross_entropy(
                layer(states).float(), functional.pad(ids, (0, others), value=-100)
            )

    return {
        "logits of every token": everywhere,
        "logits at once": at_once,
        **{f"chunks of {chunk}": in_chunks(chunk) for chunk in CHUNKS},
        "torch": of_torch(None),
        **{f"torch, chunks of {chunk}": of_torch(chunk) for chunk in CHUNKS},
    }


def _fixed(chunk: int) -> dict[str, object]:
    return {"batch_chunk_size": chunk, "chunking_method": None}


def _in_float32(layer: nn.Linear, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    logits = nn.functional.linear(hidden.float(), layer.weight.float())
    return nn.functional.cross_entropy(logits, ids)


def _gradients(method: Callable[[], torch.Tensor], leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The loss and its gradients."""
    found = method()
    return [found.detach(), *torch.autograd.grad(found, leaves)]


def _measured(
    method: Callable[[], torch.Tensor], leaves: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]
) -> dict[str, object]:
    """Seconds and bytes, forward and backward, and the largest error relative to the largest entry."""
    found = _gradients(method, leaves)
    off = max(
        float((one.float() - right.float()).abs().max() / right.float().abs().max().clamp_min(1e-30))
        for one, right in zip(found, exact, strict=True)
    )
    del found

    def work() -> None:
        _gradients(method, leaves)

    return {**rounded({"seconds": seconds(work), "bytes": peak(work), "off": off})}


# --- the patch embedding ---


def patches(findings: Findings, shapes: Shapes) -> None:
    """Conv3d against the equal linear layer: seconds, and which one is nearer to the exact result."""
    from vlcpt.model.patch_embedding import measure

    where = device()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for count in shapes.patches:
            for trains in (False, True):
                name = f"{str(dtype).removeprefix('torch.')}, {count} patches, {_how(trains)}"
                with findings.proving(name):
                    found = measure(where, dtype, shapes.patch, trains=trains, patches=count)
                    times = found.conv / found.linear
                    values = rounded({"conv": found.conv, "linear": found.linear, "times faster": times})
                    findings.note(name, {**values, "used": found.faster})
        with findings.proving(f"the errors of both forms in {dtype}"):
            findings.note(f"errors in {str(dtype).removeprefix('torch.')}", _patch_errors(shapes, dtype))


def _how(trains: bool) -> str:
    return "trained" if trains else "frozen"


def _patch_errors(shapes: Shapes, dtype: torch.dtype) -> dict[str, float | int | None]:
    """The largest error of each form against float64, relative to the largest entry."""
    from vlcpt.model.patch_embedding import embed_patches

    where = device()
    width, channels, *kernel = shapes.patch
    sizes = (kernel[0], kernel[1], kernel[2])
    layer = nn.Conv3d(channels, width, sizes, stride=sizes, bias=False, device=where, dtype=dtype)
    inputs = torch.randn(min(shapes.patches), channels, *kernel, device=where, dtype=dtype)
    exact = nn.functional.linear(inputs.double().flatten(1), layer.weight.double().flatten(1))
    found = {}
    with torch.no_grad():
        for form in ("conv", "linear"):
            embed_patches(layer, form)
            off = (layer(inputs).flatten(1).double() - exact).abs().max() / exact.abs().max()
            found[form] = float(off)
    return rounded(found)
