"""Attention by documents: its time in packs, and what the vision tower calls and asks of the device.

    python benchmarks/attention.py                          # packs of 8,192 tokens, then the tower
    python benchmarks/attention.py --quick --output x.json  # packs of 2,048, fewer repetitions

Packs: forward and backward of one attention layer over eight documents, in float32. The baseline is what
transformers runs for a pack under ``sdpa``: its own boolean T×T mask through ``sdpa_attention_forward``. The
mask is made beforehand and its making not counted, since one serves all layers. Documents of one length are
also compared with the same eight as rows of a batch, causal and without a mask, which is the least that
PyTorch's attention can take. Outputs and gradients are compared first, in float32 and float64; a wrong one
stops the benchmark.

Tower: counts, not times, so that the widths are small; blocks, windows and the image are those of the 3B.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import accumulate

import torch
from machine import options, pin
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

HEADS, KEY_HEADS, WIDTH = 2, 1, 128  # each head costs the same on both sides, so that two of them will do
DOCUMENTS = 8
# As fractions of the largest entry: sums in another order differ by a few units in the last place.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
BLOCKS, FULL_ATTENTION, IMAGE_SIDE = 32, [7, 15, 23, 31], 1000

Attend = Callable[[Sequence[torch.Tensor]], torch.Tensor]


class Layer(nn.Module):
    """As much of a layer of the language model as attention asks for."""

    is_causal = True
    num_key_value_groups = HEADS // KEY_HEADS


# --- packs ---


def unequal_lengths(tokens: int) -> list[int]:
    """Eight seeded lengths, the longest more than ten times the shortest."""
    parts = torch.rand(DOCUMENTS, generator=torch.Generator().manual_seed(1)) + 0.1
    ends = (parts.cumsum(0) / parts.sum() * tokens).round().long().tolist()
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def dense(lengths: Sequence[int]) -> Attend:
    """A pack as transformers runs it under sdpa: the mask is transformers' own, from the positions."""
    from transformers import Qwen2_5_VLTextConfig
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import create_causal_mask

    config = Qwen2_5_VLTextConfig()
    config._attn_implementation = "sdpa"
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    mask = create_causal_mask(config, torch.empty(1, sum(lengths), 1), None, None, positions)
    assert mask.dtype == torch.bool and mask.shape == (1, 1, sum(lengths), sum(lengths))
    layer, scaling = Layer(), WIDTH**-0.5

    def attend(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return sdpa_attention_forward(layer, *inputs, mask, scaling=scaling)[0]

    return attend


def by_documents(lengths: Sequence[int]) -> Attend:
    """A pack with the bounds that the collator makes."""
    from vlcpt.model.attention import by_document

    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    given = {"cu_seq_lens_q": bounds, "max_length_q": max(lengths), "document_lengths": list(lengths)}
    layer, scaling = Layer(), WIDTH**-0.5

    def attend(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return by_document(layer, *inputs, None, scaling=scaling, **given)[0]

    return attend


def unpacked(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Documents of one length as rows: (8, heads, T/8, width), causal, no mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(Layer(), *inputs, None, scaling=WIDTH**-0.5)[0]


def inputs_of(tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value of a pack (1, heads, T, width), in the layout that the model hands over."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, tokens, heads, WIDTH, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(1, heads, T, width) -> (8, heads, T/8, width), for documents of one length."""
    return tensor.transpose(1, 2).unflatten(1, (DOCUMENTS, -1))[0].transpose(1, 2)


def run(attend: Attend, inputs: Sequence[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    """Forward and backward: the output and the three gradients."""
    leaves = [one.detach().requires_grad_() for one in inputs]
    out = attend(leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def compare(
    name: str, found: Sequence[torch.Tensor], right: Sequence[torch.Tensor], dtype: torch.dtype
) -> float:
    """The largest difference, relative to the largest entry; ends the program where it is too large."""
    off = max(
        float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, right, strict=True)
    )
    if not off <= TOLERANCE[dtype]:  # also where it is NaN
        sys.exit(f"{name}: outputs or gradients differ by {off:.2g} in {dtype}; no time is worth reading.")
    return off


def measure(pair: Sequence[Callable[[], object]], repetitions: int) -> list[dict[str, list[float]]]:
    """CPU and wall seconds of two sides, in the order A B B A; one uncounted call each before."""
    found: list[dict[str, list[float]]] = [{"cpu": [], "wall": []} for _ in pair]
    for side in pair:
        side()
    for _ in range(repetitions):
        for number in (0, 1, 1, 0):
            wall, cpu = time.perf_counter(), time.process_time()
            pair[number]()
            found[number]["cpu"].append(time.process_time() - cpu)
            found[number]["wall"].append(time.perf_counter() - wall)
    return found


def ratio(found: Sequence[dict[str, list[float]]], kind: str) -> list[float]:
    """Baseline over ours, pair by pair."""
    return [one / other for one, other in zip(found[0][kind], found[1][kind], strict=True)]


Side = Callable[[], list[torch.Tensor]]


def sides(lengths: Sequence[int], in_rows: bool, dtype: torch.dtype) -> tuple[Side, Side]:
    """Baseline and ours, each giving output and gradients in the shape of the baseline."""
    tokens = sum(lengths)
    inputs = inputs_of(tokens, dtype)
    upstream = inputs[0].transpose(1, 2).flip(1)  # (1, T, heads, width)
    ours = by_documents(lengths)
    if not in_rows:
        other = dense(lengths)
        return lambda: run(other, inputs, upstream), lambda: run(ours, inputs, upstream)
    # A batch is no view of a pack: (8, T/8, heads, width), contiguous, handed over with heads first.
    rows = [as_rows(one).transpose(1, 2).contiguous().transpose(1, 2) for one in inputs]
    upstream_rows = upstream[0].unflatten(0, (DOCUMENTS, -1)).contiguous()
    return lambda: run(unpacked, rows, upstream_rows), lambda: run(ours, inputs, upstream)


def deviation(name: str, lengths: Sequence[int], in_rows: bool, dtype: torch.dtype) -> float:
    """The largest difference of outputs and gradients, see :func:`compare`."""
    right, (output, *gradients) = (side() for side in sides(lengths, in_rows, dtype))
    if in_rows:
        output = output[0].unflatten(0, (DOCUMENTS, -1))
        gradients = [as_rows(one) for one in gradients]
    return compare(name, [output, *gradients], right, dtype)


def compare_packs(tokens: int, repetitions: int) -> list[dict[str, object]]:
    """Packs of unequal and of equal documents against the mask, and of equal ones against rows."""
    equal = [tokens // DOCUMENTS] * DOCUMENTS
    cases = [
        ("dense mask, unequal documents", unequal_lengths(tokens), False),
        ("dense mask, equal documents", equal, False),
        ("unpacked rows, equal documents", equal, True),
    ]
    rows = []
    for name, lengths, in_rows in cases:
        off = [deviation(name, lengths, in_rows, dtype) for dtype in (torch.float32, torch.float64)]
        times = measure(sides(lengths, in_rows, torch.float32), repetitions)
        rows.append({"against": name, "lengths": lengths, "off": off, "baseline": times[0], "ours": times[1]})
        cpu, wall = ratio(times, "cpu"), ratio(times, "wall")
        medians = [statistics.median(one["cpu"]) for one in times]
        print(
            f"| {name} | {min(lengths):,} to {max(lengths):,} | {off[0]:.1e} | {off[1]:.1e} "
            f"| {medians[0]:.3f} s | {medians[1]:.3f} s | {statistics.median(cpu):.2f} "
            f"({min(cpu):.2f} to {max(cpu):.2f}) | {statistics.median(wall):.2f} |",
            flush=True,
        )
    return rows


# --- the vision tower ---


LOOKS = {
    torch.ops.aten._local_scalar_dense.default: "item or bool",
    torch.ops.aten.nonzero.default: "nonzero",
    torch.ops.aten.masked_select.default: "nonzero",
    torch.ops.aten.unique_consecutive.default: "unique",
    torch.ops.aten.repeat_interleave.Tensor: "repeat_interleave",
}


class Looks(TorchDispatchMode):
    """Counts what makes a program wait for its device, by kind.

    ``item`` and the bool of a tensor are both ``_local_scalar_dense``. Indexing by a bool tensor looks for
    what is true in it, as ``nonzero`` does, and repeating by a tensor of counts adds these up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in LOOKS:
            self.counts[LOOKS[func]] += 1
        elif func is torch.ops.aten.index.Tensor:
            self.counts["nonzero"] += any(one is not None and one.dtype == torch.bool for one in args[1])
        return func(*args, **(kwargs or {}))


@contextmanager
def looks() -> Iterator[Counter[str]]:
    """What is asked of the device meanwhile; ``tolist`` passes by the dispatcher and is wrapped."""
    own, inherited = torch.Tensor.tolist, "tolist" not in vars(torch.Tensor)
    mode = Looks()

    def tolist(tensor: torch.Tensor) -> object:
        mode.counts["tolist"] += 1
        return own(tensor)

    torch.Tensor.tolist = tolist  # type: ignore[method-assign]
    try:
        with mode:
            yield mode.counts
    finally:
        if inherited:
            del torch.Tensor.tolist
        else:
            torch.Tensor.tolist = own  # type: ignore[method-assign]


@contextmanager
def counted_calls(name: str) -> Iterator[Counter[str]]:
    """Calls of the registered attention function ``name`` and of torch's sdpa."""
    from transformers import AttentionInterface

    counts: Counter[str] = Counter()

    def counting(kind: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            counts[kind] += 1
            return function(*args, **kwargs)

        return call

    registered = AttentionInterface._global_mapping[name]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    AttentionInterface._global_mapping[name] = counting("function", registered)
    torch.nn.functional.scaled_dot_product_attention = counting("sdpa", sdpa)
    try:
        yield counts
    finally:
        AttentionInterface._global_mapping[name] = registered
        torch.nn.functional.scaled_dot_product_attention = sdpa


def tower() -> nn.Module:
    """A vision tower with the 3B's blocks, windows and patches."""
    from transformers import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(
        depth=BLOCKS,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        out_hidden_size=64,
        window_size=112,
        fullatt_block_indexes=FULL_ATTENTION,
    )
    config._attn_implementation = "sdpa"
    return Qwen2_5_VisionTransformerPretrainedModel(config).eval()


def image_batch() -> dict[str, object]:
    """The arguments of the tower for one image, as the collator gives them."""
    import numpy as np
    from PIL import Image as PILImage

    from vlcpt import CPTDataCollator, CPTDataset, load_processor
    from vlcpt.demo import base_path

    noise = np.random.default_rng(0).integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8)
    file = BytesIO()
    PILImage.fromarray(noise).save(file, "PNG")
    row = {"text": "<image> 1", "images": [{"bytes": file.getvalue()}]}
    processor = load_processor(base_path())
    collator = CPTDataCollator(processor)
    collator.window_size = 112
    batch = collator([CPTDataset([row], processor, max_length=2048, max_pixels=2_000_000)[0]])
    given = {name.removeprefix("image_"): value for name, value in batch.items() if name.startswith("image_")}
    return {"hidden_states": batch["pixel_values"], **given}


def count_tower() -> list[dict[str, object]]:
    """Rows: sdpa as upstream calls it, and attention by documents with what the collator hands over."""
    from vlcpt.model.attention import BY_DOCUMENT, attend_by_document

    model, batch = tower(), image_batch()
    grid = batch["grid_thw"].tolist()[0]
    assert grid == [1, 72, 72], grid
    plain = {name: batch[name] for name in ("hidden_states", "grid_thw")}
    rows, outputs = [], []
    # The attention function is looked up by name; sdpa is in the registry of transformers.
    for name, given in (("sdpa", plain), (BY_DOCUMENT, batch)):
        if name == BY_DOCUMENT:
            attend_by_document(model)
        with torch.no_grad(), counted_calls(name) as calls, looks() as seen:
            outputs.append(model(**given).pooler_output)
        rows.append({"attention": name, "calls": dict(calls), "looks": dict(seen)})
    off = float((outputs[1] - outputs[0]).abs().max() / outputs[0].abs().max())
    if not off <= 1e-5:
        sys.exit(f"the tower's outputs differ by {off:.2g}; no count is worth reading.")
    for row in rows:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(row["looks"].items()) if count)
        total = sum(row["looks"].values())
        row["off"] = off
        print(
            f"| {row['attention']} | {row['calls'].get('function', 0):,} | {row['calls'].get('sdpa', 0):,} "
            f"| {total} {f'({kinds})' if kinds else ''} |",
            flush=True,
        )
    return rows


def main() -> None:
    parser = options(
        __doc__, each="both sides twice", quick="Packs of 2,048 tokens, two repetitions.", plots=False
    )
    parser.add_argument("--tokens", type=int, default=8192, help="Tokens of a pack, a multiple of 8.")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.repetitions = 2048, 2
    pin()
    print(f"{arguments.tokens:,} tokens, {DOCUMENTS} documents\n")
    print(
        "| against | lengths | off, float32 | off, float64 | CPU, baseline | CPU, by documents | CPU ratio "
        "| wall ratio |\n" + "|---" * 8 + "|"
    )
    packs = compare_packs(arguments.tokens, arguments.repetitions)
    print(
        "\n| attention of the tower | calls of the function | calls of torch's sdpa | looks |\n"
        + "|---" * 4
        + "|"
    )
    found = {"tokens": arguments.tokens, "torch": torch.__version__, "packs": packs, "tower": count_tower()}
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
