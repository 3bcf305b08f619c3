"""Make everything that ``vlcpt demo`` ships: ``python -m vlcpt.demo.build [--steps N]``.

1. The processor, from the text of both domains and general.txt.
2. The documents in data/, as JSONL with their media.
3. The base model, trained in full on old-domain documents and general text, never on new ones.

Needs scikit-learn and scikit-image. The same seed gives the same documents and the same processor
anywhere; the weights repeat on the same machine and versions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from random import Random

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from vlcpt.demo.build_data import CHINESE, GENERAL_TEXT, Domain, Sheet, Split, make_sheets, make_texts
from vlcpt.demo.build_tokenizer import build_processor, build_tokenizer

HERE = Path(__file__).parent
MARKUP = re.compile(r"(</?trainable_text>|<image>|<video>)")
SHIPPED: dict[str, tuple[Domain, Split, int]] = {
    "new_train": ("new", "train", 256),
    "new_eval": ("new", "held_out", 48),
    "old_replay": ("old", "train", 190),
    "old_eval": ("old", "held_out", 48),
}
PACK_TOKENS = 512
# Of the documents of the base's training, the share without media.
TEXT_SHARE = 0.25
# Keeps the base from being so sure that a few steps of training cannot change its mind.
LABEL_SMOOTHING = 0.03


@dataclass(frozen=True)
class Sample:
    """One encoded document, for the base's training only."""

    input_ids: list[int]
    targets: list[bool]
    images: list[Image.Image]
    videos: list[np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=3000, help="Steps of the base's training; 0 leaves it random."
    )
    parser.add_argument("--output_dir", type=Path, default=HERE, help="Where base/ and data/ are written.")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)

    processor = build_processor(build_tokenizer(_tokenizer_texts()))
    write_documents(arguments.output_dir / "data")
    model = build_model(processor)
    train_base(model, processor, arguments.steps)
    save_base(model, processor, arguments.output_dir / "base")


def write_documents(folder: Path) -> None:
    """Write the shipped data sets: a JSONL file each, and the media they name."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, (domain, split, count) in SHIPPED.items():
        rows = []
        for number, sheet in enumerate(itertools.islice(make_sheets(domain, split, seed=1), count)):
            row: dict[str, object] = {"id": f"{name}-{number:03d}", "text": sheet.text}
            for kind, files in (("images", sheet.images), ("videos", sheet.videos)):
                if files:
                    row[kind] = [
                        _write_media(folder / kind / f"{name}_{number:03d}_{n}", data)
                        for n, data in enumerate(files)
                    ]
            rows.append(json.dumps(row, ensure_ascii=False))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def build_model(processor: Qwen2_5_VLProcessor) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of 1.7 million random weights."""
    ids = processor.tokenizer.convert_tokens_to_ids
    hidden = 128
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [2],
            "tokens_per_second": 2,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        dtype="float32",
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    # As the published models have it: continued pre-training ends documents with the second one.
    model.generation_config = GenerationConfig(
        bos_token_id=ids("<|endoftext|>"),
        pad_token_id=ids("<|endoftext|>"),
        eos_token_id=[ids("<|im_end|>"), ids("<|endoftext|>")],
    )
    return model


def train_base(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, steps: int) -> None:
    """Train all weights on packs of fresh documents; prints the loss and the time."""
    packs = pack_samples(base_samples(processor))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 1), pct_start=0.05)
    model.train()
    began, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        loss = pack_loss(model, processor, next(packs), LABEL_SMOOTHING).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            print(
                f"step {step}  loss {np.mean(losses[-100:]):.3f}  {time.monotonic() - began:.0f} s",
                flush=True,
            )
    model.eval()


def base_samples(processor: Qwen2_5_VLProcessor) -> Iterator[Sample]:
    """Old-domain documents and text, in turn and without end."""
    random = Random("base")
    documents, texts = make_sheets("old", "train", seed=0), make_texts(seed=0)
    while True:
        yield encode_sheet(next(texts if random.random() < TEXT_SHARE else documents), processor)


def encode_sheet(sheet: Sheet, processor: Qwen2_5_VLProcessor) -> Sample:
    """Encode markup by the rules of vlcpt for the few shapes that occur here."""
    tokenizer = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids
    images = [Image.open(BytesIO(data)).convert("RGB") for data in sheet.images]
    videos = [_decode_clip(data) for data in sheet.videos]
    cells = {
        "<image>": iter([(image.height // 28) * (image.width // 28) for image in images]),
        "<video>": iter([len(clip) // 2 * (clip.shape[2] // 28) * (clip.shape[3] // 28) for clip in videos]),
    }
    input_ids: list[int] = []
    targets: list[bool] = []
    run, inside = "", False
    trained: list[bool] = []
    for piece in (*MARKUP.split(sheet.text), "<end>"):
        if piece in ("<trainable_text>", "</trainable_text>"):
            inside = piece == "<trainable_text>"
        elif piece in (*cells, "<end>"):
            encoding = tokenizer(run, return_offsets_mapping=True)
            input_ids += encoding["input_ids"]
            targets += [
                any(trained[i] for i in range(*span) if not run[i].isspace())
                for span in encoding["offset_mapping"]
            ]
            run, trained = "", []
            if piece != "<end>":
                pad = ids("<|image_pad|>" if piece == "<image>" else "<|video_pad|>")
                medium = [ids("<|vision_start|>"), *[pad] * next(cells[piece]), ids("<|vision_end|>")]
                input_ids += medium
                targets += [False] * len(medium)
        else:
            run += piece
            trained += [inside] * len(piece)
    targets[0] = False  # nothing comes before it
    return Sample([*input_ids, ids("<|endoftext|>")], [*targets, True], images, videos)


def pack_samples(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    """Lists of consecutive samples that together hold at most ``PACK_TOKENS`` tokens."""
    pack: list[Sample] = []
    for sample in samples:
        if sum(len(other.input_ids) for other in (*pack, sample)) > PACK_TOKENS:
            yield pack
            pack = []
        pack.append(sample)


def pack_loss(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    pack: list[Sample],
    smoothing: float = 0.0,
) -> torch.Tensor:
    """The loss of each target of a pack whose documents do not see each other, shape (targets,)."""
    input_ids = torch.tensor([[number for sample in pack for number in sample.input_ids]])  # (1, T)
    targets = torch.tensor([flag for sample in pack for flag in sample.targets])  # (T,)
    images = [image for sample in pack for image in sample.images]
    videos = [clip for sample in pack for clip in sample.videos]
    media = dict(processor.image_processor(images, return_tensors="pt")) if images else {}
    if videos:
        media |= dict(processor.video_processor(videos, return_tensors="pt"))
    kinds = (input_ids == model.config.image_token_id) + 2 * (input_ids == model.config.video_token_id)
    rope, _ = model.model.get_rope_index(
        input_ids,
        kinds.int(),
        media.get("image_grid_thw"),
        media.get("video_grid_thw"),
        torch.ones(len(videos)),
    )  # (3, 1, T)
    # Documents may start anywhere: rotary positions are relative. The text row restarts, which
    # transformers reads as a document's edge, and only without an attention mask.
    text_row = torch.cat([torch.arange(len(sample.input_ids)) for sample in pack])[None, None]
    predicts = torch.cat([targets[1:], targets.new_zeros(1)])
    output = model(
        input_ids=input_ids,
        position_ids=torch.cat([text_row, rope]),
        attention_mask=None,
        use_cache=False,
        logits_to_keep=predicts[None],
        **media,
    )
    logits = output.logits.view(-1, output.logits.shape[-1])  # (targets, vocabulary)
    return functional.cross_entropy(
        logits, input_ids[0, targets], reduction="none", label_smoothing=smoothing
    )


def save_base(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, folder: Path
) -> None:
    """Write the model and its processor; weights as bfloat16, to be read as float32 (half the file)."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(
        {name: value.bfloat16() for name, value in load_file(file).items()}, file, metadata={"format": "pt"}
    )
    file.chmod(0o644)


def _tokenizer_texts() -> Iterator[str]:
    yield GENERAL_TEXT.read_text(encoding="utf-8")
    for domain in ("old", "new"):
        for sheet in itertools.islice(make_sheets(domain, "train", seed=0), 600):
            text = MARKUP.sub("\n", sheet.text)
            # Apart, so that each Chinese digit stays a token of its own.
            yield re.sub(f"([{CHINESE}])", r"\n\1\n", text)


def _write_media(stem: Path, data: bytes) -> str:
    suffix = {b"\x89PNG": ".png", b"\xff\xd8\xff\xe0": ".jpg"}.get(data[:4], ".mp4")
    path = stem.with_name(stem.name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return f"{path.parent.name}/{path.name}"


def _decode_clip(data: bytes) -> np.ndarray:
    """The frames of an MP4, shape (frames, 3, height, width)."""
    with av.open(BytesIO(data), "r") as container:
        container.streams.video[0].codec_context.thread_count = 1  # threads cost more than 8 frames
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames).transpose(0, 3, 1, 2)


if __name__ == "__main__":
    main()
