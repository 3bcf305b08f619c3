"""Which tokens need the picture, where that is known: captions of easy-vqa, after training on them.

    python benchmarks/reliance.py                     # a minute on one core

An image of easy-vqa (PyPI) holds one shape of one colour: eight colours, three shapes. Its caption, "There is
a red circle in the picture.", is constant but for those two words, so a model that has learnt it needs its
image there and nowhere else: ln 8 = 2.08 nats for the colour and ln 3 = 1.10 for the shape if it guesses
evenly without. The embedded base of the demo, which reads cards with digits, is trained further, all towers,
on the captions of the training images whose questions name both words, cut out around the shape; each eighth
caption is there once more with a blank picture, so that what the model expects without one is no accident.
The test images are measured. A word's nats are the sum over its tokens.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import easy_vqa
import numpy as np
import PIL.Image
import torch
from machine import about

from vlcpt import CPTConfig, CPTDataset, CPTTrainer, ModelConfig, load_model, load_processor
from vlcpt.data.encode.pieces import token_texts
from vlcpt.data.plan.split import Part
from vlcpt.demo import base_path
from vlcpt.report.reliance import token_nats
from vlcpt.training.evaluate import EvalOptions, score_sets
from vlcpt.training.scores import SetScores

COLOURS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
SHAPES = {"circle", "rectangle", "triangle"}
WORDS = ("There", "is", "a", "colour", "shape", "in", "the", "picture", ".", "end of text")
NEEDED = ("colour", "shape")
EPOCHS, RATE, LENGTH = 1.5, 2e-3, 640


def captions(split: str) -> list[dict[str, object]]:
    """A row for each image: its caption, and the picture around its shape."""
    questions, answers, images = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    found: dict[int, dict[str, str]] = {number: {} for number in sorted(paths)}
    for question, answer, number in zip(questions, answers, images, strict=True):
        if answer not in ("yes", "no"):  # whose questions also ask for what is not there
            for word in (answer, *question.rstrip("?").split()):
                if word in SHAPES or word in COLOURS:
                    found[number]["shape" if word in SHAPES else "colour"] = word
    return [
        {
            "id": f"{split} {number}",
            "text": "<image>\nCaption: <trainable_text>There is a "
            f"{words['colour']} {words['shape']} in the picture.</trainable_text>",
            "images": [{"bytes": around_shape(Path(paths[number]))}],
        }
        for number, words in found.items()
        if len(words) == 2
    ]


def with_blanks(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Rows, and of each eighth its caption again under a picture of the processor's mean colour."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (56, 56), (123, 117, 104)).save(file, "PNG")
    blanks = [
        {**row, "id": f"{row['id']} blank", "images": [{"bytes": file.getvalue()}]} for row in rows[::8]
    ]
    return rows + blanks


def around_shape(path: Path) -> bytes:
    """A picture's shape with a margin, 56×56: places and sizes would take longer to learn."""
    picture = PIL.Image.open(path).convert("RGB")
    pixels = np.asarray(picture).reshape(-1, 3)
    kinds, counts = np.unique(pixels, axis=0, return_counts=True)
    is_shape = (pixels != kinds[counts.argmax()]).any(axis=1).reshape(picture.size[::-1])
    rows, columns = (np.flatnonzero(is_shape.any(axis=axis)) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    margin = 2 + max(bottom - top, right - left) // 8
    box = (left - margin, top - margin, right + margin, bottom + margin)
    colour = tuple(kinds[counts.argmax()].tolist())
    background = PIL.Image.new("RGB", (int(box[2] - box[0]), int(box[3] - box[1])), colour)
    background.paste(picture, (-int(box[0]), -int(box[1])))
    file = io.BytesIO()
    background.resize((56, 56)).save(file, "PNG")
    return file.getvalue()


def word_nats(scores: SetScores, dataset: CPTDataset, processor: object) -> dict[str, np.ndarray]:
    """What its image gives each word, by its name an array of all captions; of two also their first token."""
    assert scores.targets is not None
    texts = token_texts(processor.tokenizer)
    found: dict[str, list[float]] = {}
    for number in range(len(dataset.documents)):
        _, stream = dataset.documents.encoded(number)
        nats = scores.targets.of_document(number, len(stream))
        assert nats is not None
        words: list[list[float]] = []
        for text, value in token_nats(stream, [Part(0, len(stream), False, 0)], nats, texts):
            if value is not None and (not words or text[0] in " .<"):
                words.append([])
            if value is not None:
                words[-1].append(value)
        for name, values in zip(WORDS, words, strict=True):
            found.setdefault(name, []).append(sum(values))
            if name in NEEDED:
                found.setdefault(f"{name}, first token", []).append(values[0])
    return {name: np.array(values) for name, values in found.items()}


def train(folder: Path, processor: object, epochs: float) -> torch.nn.Module:
    """The demo's base, trained further on the captions, all towers."""
    dataset = CPTDataset(with_blanks(captions("train")), processor, max_length=LENGTH)
    model = load_model(ModelConfig(base_path(), tuning="full", train_vision=True, train_merger=True))
    args = CPTConfig(
        output_dir=str(folder),
        max_length=LENGTH,
        num_train_epochs=epochs,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_num_workers=0,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
    )
    CPTTrainer(model, args, train_dataset=dataset, processing_class=processor).train()
    return model


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="Over the training captions.")
    parser.add_argument("--output", type=Path, help="JSON with the numbers.")
    given = parser.parse_args()
    processor = load_processor(base_path())
    torch.manual_seed(0)
    start, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        model = train(Path(folder), processor, given.epochs)
    took = {"seconds": time.monotonic() - start, "CPU seconds": time.process_time() - cpu}
    dataset = CPTDataset(captions("test"), processor, max_length=LENGTH)
    scores = score_sets(model, {"test": dataset}, processor, EvalOptions(4), keeps_targets=True)["test"]
    result = scores.result()
    print(f"{result['documents']} held-out captions, loss {result['loss']:.4f}, {result['reliance']}")
    words = word_nats(scores, dataset, processor)
    for name, values in words.items():
        low, high = np.quantile(values, [0.05, 0.95])
        print(f"{name:20} {values.mean():8.4f} nats   5% {low:8.4f}   95% {high:8.4f}")
    print(f"training took {took['seconds']:.0f} s, {took['CPU seconds']:.0f} s of CPU")
    if given.output:
        means = {name: float(values.mean()) for name, values in words.items()}
        given.output.write_text(json.dumps({**about(), **took, "nats": means, "set": result}, indent=1))


if __name__ == "__main__":
    main()
