"""Documents for the tests of training, and their loss by a road that shares nothing with it.

Each document runs alone through the plain model, with the model's own positions and a mask of ones: no
packing, no collator, no Trainer, no ``logits_to_keep``.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image as PILImage
from torch import nn
from transformers import TrainerCallback

from vlcpt import CPTConfig, CPTDataset, CPTTrainer, encode_document, parse_markup
from vlcpt.data.encode.encoder import Sample
from vlcpt.data.rows.open import SourceConfig
from vlcpt.data.sources import DocumentSource, open_source
from vlcpt.demo import base_path

IGNORED = -100
# Every clip here has 16 frames at 8 a second, of which 2 a second are taken: 2 time steps, a second apart.
SECONDS_PER_GRID = 1.0


def png(seed: int, width: int = 56, height: int = 56) -> bytes:
    """The file of an image of noise; 28 pixels make a token."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = BytesIO()
    PILImage.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def avi(seed: int, frames: int = 16, rate: int = 8, width: int = 56, height: int = 56) -> bytes:
    """The file of a clip of noise."""
    rng = np.random.default_rng(seed)
    file = BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=rate, width=width, height=height, pix_fmt="yuvj420p")
        for _ in range(frames):
            pixels = np.kron(rng.integers(0, 256, (height // 14, width // 14, 3)), np.ones((14, 14, 1)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def digits(count: int, seed: int = 0) -> str:
    """Text of exactly ``count`` tokens: the pre-tokenizer parts digits."""
    return "".join(map(str, np.random.default_rng(seed).integers(0, 10, count)))


def row(text: str, *, images: Sequence[bytes] = (), videos: Sequence[bytes] = ()) -> dict[str, object]:
    """A row as a data set in memory has it."""
    files = {"images": images, "videos": videos}
    return {"text": text} | {key: [{"bytes": one} for one in found] for key, found in files.items() if found}


# 15, 1, 40 and 7 targets, end-of-text among those of the first and third. Media before, inside and after
# spans.
FOUR = [
    row(f"a <image> b<trainable_text>{digits(14, 1)}</trainable_text>", images=[png(1)]),
    row(f'one <trainable_text weight="0.3">{digits(1, 2)}</trainable_text> two'),
    row(
        f'<video>x<trainable_text weight="2.5">{digits(29, 3)}<image>{digits(10, 4)}</trainable_text> '
        "<image>",
        images=[png(2, 84, 56), png(3)],
        videos=[avi(1)],
    ),
    row(f"words alone <trainable_text>{digits(7, 5)}</trainable_text>."),
]
FOUR_TARGETS = [15, 1, 40, 7]
# Six more, so that there are packs of several documents, and batches of several packs.
TEN = [
    *FOUR,
    row(f"<video><video>y<trainable_text>{digits(11, 6)}</trainable_text>", videos=[avi(2), avi(3)]),
    row(f"three <trainable_text>{digits(20, 7)}</trainable_text>"),
    row(f"<image><image>z<trainable_text>{digits(5, 8)}</trainable_text>", images=[png(4), png(5, 56, 84)]),
    row(f"four <trainable_text>{digits(3, 9)}</trainable_text>, <image>", images=[png(6)]),
    row(f'five <trainable_text weight="4">{digits(24, 10)}</trainable_text>'),
    row(f"<image>six <trainable_text>{digits(16, 11)}</trainable_text>", images=[png(7)]),
]


def write_run(folder: Path, *lines: str) -> Path:
    """The configuration of a run on the demo's base with four texts of 300 tokens, and their file."""
    rows = [{"text": digits(300, number)} for number in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = folder / "run.yaml"
    of_run = (f"model_name_or_path: {base_path()}", "train_data: train.jsonl", "output_dir: out")
    config.write_text("".join(f"{line}\n" for line in (*of_run, "max_length: 512", *lines)))
    return config


def encode_rows(rows: Sequence[Mapping[str, object]], processor: object) -> list[Sample]:
    """Each row as ``encode_document`` gives it: whole, nothing trimmed."""
    return [
        encode_document(parse_markup(one["text"], one.get("images", ()), one.get("videos", ())), processor)
        for one in rows
    ]


def own_positions(model: nn.Module, sample: Sample, seconds: float = SECONDS_PER_GRID) -> torch.Tensor:
    """``get_rope_index`` of the model for one sample: (3, 1, T)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, ids = base.config, sample.input_ids[None]
    types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    grids = sample.video_grid_thw
    positions, _ = base.model.get_rope_index(
        ids,
        types,
        image_grid_thw=sample.image_grid_thw,
        video_grid_thw=grids,
        second_per_grid_ts=None if grids is None else torch.full((len(grids),), seconds),
    )
    return positions


@dataclass(frozen=True)
class Alone:
    """The targets of one document, computed alone; N of them."""

    ids: tuple[int, ...]  # all tokens up to the last target, by which a pack's document is known
    logits: torch.Tensor  # (N, vocabulary)
    nll: torch.Tensor  # (N,)
    weights: torch.Tensor  # (N,)


def run_alone(model: nn.Module, sample: Sample, seconds: float = SECONDS_PER_GRID) -> Alone:
    """One document through the plain model."""
    media = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    ids = sample.input_ids[None]
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=own_positions(model, sample, seconds),
        use_cache=False,
        **{name: getattr(sample, name) for name in media if getattr(sample, name) is not None},
    ).logits[0]
    places = [place for place in range(1, len(sample)) if sample.labels[place] != IGNORED]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    nll = [-wide[place - 1].log_softmax(0)[sample.input_ids[place]] for place in places]
    return Alone(
        ids=tuple(sample.input_ids[: places[-1] + 1].tolist()),
        logits=logits[[place - 1 for place in places]],
        nll=torch.stack(nll),
        weights=sample.loss_weights[places],
    )


def weighted_mean(documents: Sequence[Alone]) -> torch.Tensor:
    """Σ weight · nll / Σ weight."""
    total = sum((one.nll * one.weights).sum() for one in documents)
    return total / sum(one.weights.sum() for one in documents)


def make_trainer(
    model: nn.Module, dataset: CPTDataset | None, processor: object, folder: Path, **settings: object
) -> CPTTrainer:
    """A trainer on the CPU, in this process, that saves and reports nothing unless asked to."""
    extra = {name: settings.pop(name) for name in ("callbacks", "eval_dataset") if name in settings}
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "max_length": dataset.max_length if dataset is not None else 128,
        "packing": dataset.packing if dataset is not None else False,
    }
    args = CPTConfig(output_dir=str(folder), **(defaults | settings))
    return CPTTrainer(model, args, train_dataset=dataset, processing_class=processor, **extra)


class Gradients(TrainerCallback):
    """Keeps the gradient of each step, as the optimizer gets it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def largest_deviation(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest difference in any tensor, relative to that tensor's largest value."""
    assert found.keys() == expected.keys()
    assert found
    return max(
        float((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-12))
        for name in expected
    )


def wait_for(happens: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until something happens; fail if it does not."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.02)


def opened(
    given, *, name="", media_root=None, untagged="train", max_row_bytes=2**28, **values
) -> DocumentSource:
    """A source from its path, or from rows in memory, and the fields of its configuration."""
    path, rows = (str(given), None) if isinstance(given, str | Path) else ("rows", given)
    root = None if media_root is None else str(media_root)
    config = SourceConfig(path, name=name, media_root=root, **values)
    return open_source(config, rows, untagged=untagged, max_row_bytes=max_row_bytes)
