"""The ledger of 100,000 documents, a tenth of them bad in 20 ways, against a count made with them."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

DOCUMENTS = 100_000
MAX_LENGTH = 256
OPEN, CLOSE = "<trainable_text>", "</trainable_text>"


def run(folder: Path) -> dict[str, object]:
    """Plan the data set in this process and with two more; both ledgers are the expected one."""
    import PIL.Image

    from vlcpt import CPTDataset, load_processor
    from vlcpt.demo import base_path

    data = folder / "data"
    data.mkdir()
    PIL.Image.new("RGB", (84, 56), "navy").save(data / "a.png")  # 3 × 2 tokens of 28 × 28 pixels
    PIL.Image.new("RGB", (900, 900), "navy").save(data / "large.png")
    (data / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0\0")
    PIL.Image.new("RGB", (9, 9)).save(folder / "secret.png")
    processor = load_processor(base_path())
    (large,) = processor._get_num_multimodal_tokens(image_sizes=[(900, 900)])["num_image_tokens"]
    documents, tokens = _write(data / "train.jsonl", large)
    found: dict[str, object] = {"documents": DOCUMENTS, "bad": sum(documents["dropped"].values())}
    for workers in (0, 2):
        start = time.perf_counter()
        dataset = CPTDataset(
            data / "train.jsonl", processor, max_length=MAX_LENGTH, on_bad_data="skip", max_bad_fraction=0.2,
            num_proc=workers,
        )  # fmt: skip
        found[f"{workers}_workers_s"] = round(time.perf_counter() - start, 1)
        dataset.ledger.check()
        total = dataset.ledger.as_json()["total"]
        for reported, expected in ((total["documents"], documents), (total["tokens"], tokens)):
            assert {key: reported[key] for key in expected} == expected, (reported, expected)
        assert int(dataset.pack_sizes()[:, 1].sum()) == tokens["targets"]
        dataset.ledger.write(folder / "out")
        lines = (folder / "out/dropped.jsonl").read_text().splitlines()
        assert Counter(json.loads(line)["reason"] for line in lines) == documents["dropped"]
    return {**found, "tokens": tokens["read"], "targets": tokens["targets"], "dropped": documents["dropped"]}


def _write(path: Path, large: int) -> tuple[dict[str, object], dict[str, object]]:
    """Write the rows; what the ledger must say of documents and tokens. A digit is a token."""
    rng = random.Random(0)
    bad = _bad()
    assert len(bad) == 20
    tokens: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    dropped_tokens: Counter[str] = Counter()
    documents: Counter[str] = Counter(read=DOCUMENTS)
    with path.open("w") as file:
        for number in range(DOCUMENTS):
            if number % 10 == 7:
                row, reason = bad[number // 10 % len(bad)]
                file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
                dropped[reason] += 1
                if reason == "medium_too_large":  # the one bad kind that could be encoded: 1 + media + end
                    dropped_tokens[reason] += 1 + 2 + large + 1
                    documents["untagged"] += 1
                continue
            before, inside, after = rng.randint(1, 40), rng.randint(1, 60), rng.randint(1, 30)
            kind = number % 7
            # Without an "after", end-of-text is a target.
            counts = {"context": before, "targets": inside + 1}
            text = f"{_digits(rng, before)}{OPEN}{_digits(rng, inside)}{CLOSE}"
            images: list[str] = []
            if kind == 1:
                text += _digits(rng, after)
                counts = {"context": before, "targets": inside, "trimmed": after + 1}
            elif kind == 2:
                text, images = f"<image>{text}", ["a.png"]
                counts |= {"media": 6, "special": 2}
            elif kind == 3:
                text, images = f"{text}<image>{_digits(rng, after)}", ["a.png"]
                counts = {"context": before, "targets": inside, "trimmed": 8 + after + 1}
            elif kind == 4:
                text = _digits(rng, inside)
                counts = {"context": 1, "targets": inside, "targets_without_context": 1}
                documents["untagged"] += 1
            elif kind == 5:
                inside = rng.randint(300, 900)
                text = f"{_digits(rng, before)}{OPEN}{_digits(rng, inside)}{CLOSE}"
                counts = {"context": before, "targets": inside + 1}
                documents["split"] += 1
            elif kind == 6 and number % 5 == 0:
                text, counts = f"{_digits(rng, before)}{OPEN}{CLOSE}", {}
                documents["empty_spans"] += 1
                documents["without_targets"] += 1
                dropped["without_targets"] += 1
                dropped_tokens["without_targets"] += before + 1
            documents["used"] += bool(counts)
            tokens += Counter(counts)
            file.write(json.dumps({"text": text, "images": images}) + "\n")
    summed = sum(tokens[key] for key in ("targets", "context", "media", "special", "trimmed"))
    return (
        {**documents, "not_drawn": 0, "dropped": dict(sorted(dropped.items()))},
        {**tokens, "read": summed + dropped_tokens.total(), "dropped": dict(sorted(dropped_tokens.items()))},
    )


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("0123456789", k=count))


def _bad() -> list[tuple[object, str]]:
    """Rows that cannot be used, and what the ledger calls the reason."""

    def image(reference: object) -> dict[str, object]:
        return {"text": "1<image>", "images": [reference]}

    return [
        ('{"text": "a', "json"),
        ("[1, 2]", "json"),
        ({"txt": "a"}, "row"),
        ({"text": 7}, "row"),
        ({"text": "a", "id": [1]}, "row"),
        ({"text": f"a{OPEN}b{OPEN}c{CLOSE}"}, "markup"),
        ({"text": f"a{OPEN}b"}, "markup"),
        ({"text": f"a{CLOSE}"}, "markup"),
        ({"text": "<trainable_text weight=1>a"}, "markup"),
        ({"text": f'<trainable_text weight="101">a{CLOSE}'}, "markup"),
        ({"text": "<image><IMG1>", "images": ["a.png"] * 2}, "markup"),
        ({"text": "a<image>"}, "markers"),
        ({"text": "a", "images": ["a.png"]}, "markers"),
        (image(None), "reference"),
        (image({"path": "a.png", "max_pixel": 9}), "reference"),
        (image("none.png"), "medium"),
        (image("../secret.png"), "medium"),
        (image("https://example.org/a.png"), "medium"),
        (image("cut.jpg"), "medium"),
        (image("large.png"), "medium_too_large"),
    ]
