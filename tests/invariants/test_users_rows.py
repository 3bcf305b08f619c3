"""Rows as their owners write them: targets and ledger, counted by the tokenizer alone."""

import json
from pathlib import Path

import pytest
from torch.utils.data import DataLoader
from transformers import ProcessorMixin

from tests.support import png
from vlcpt import CPTDataCollator, CPTDataset

Piece = tuple[str, bool]  # a text, and whether it is trained; "" stands for an image of 4 tokens


def counted(documents: list[list[Piece]], processor: ProcessorMixin) -> dict[str, int]:
    """Tokens by what becomes of them. Each text between images is encoded whole, and its spans do not cut a
    token; each document ends with a target, and so its end of text is one."""
    found = {"read": 0, "targets": 0, "context": 0, "media": 0, "special": 0}
    for pieces in documents:
        runs: list[list[Piece]] = [[]]
        for piece in pieces:
            if piece[0]:
                runs[-1].append(piece)
            else:
                runs.append([])
                found["media"] += 4
                found["special"] += 2
        for run in runs:
            marks = "".join(("x" if trained else "-") * len(text) for text, trained in run)
            encoded = processor.tokenizer(
                "".join(text for text, _ in run), add_special_tokens=False, return_offsets_mapping=True
            )
            for start, stop in encoded["offset_mapping"]:
                inside = set(marks[start:stop])
                assert len(inside) == 1, "a span cuts a token: other texts, please"
                found["targets" if inside == {"x"} else "context"] += 1
        found["targets"] += 1
    found["read"] = sum(found.values())
    return found


def conversations() -> tuple[list[dict[str, object]], list[list[Piece]]]:
    """Forty rows of two to four turns of a person and the model, with none to two pictures."""
    rows, documents = [], []
    for number in range(40):
        turns, pieces, images = [], [], []
        for turn in range(1 + number % 2 + 1):
            asked, said = (
                f"第{number}行第{turn}轮，图里有什么？",
                f"图中是一只阀门，编号为{number * 7 + turn}。",
            )
            has_image = turn < number % 3
            if has_image:
                images.append("甲.png" if turn else "乙.png")
                pieces.append(("", False))
            turns.append({"from": "human", "value": ("<image>" if has_image else "") + asked})
            turns.append({"from": "gpt", "value": said})
            pieces += [(asked + "\n", False), (said + "\n", True)]
        pieces[-1] = (pieces[-1][0][:-1], True)
        rows.append({"id": f"行{number}", "conversations": turns, "images": images})
        documents.append(pieces)
    return rows, documents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "甲.png").write_bytes(png(1))
    (tmp_path / "乙.png").write_bytes(png(2))
    return tmp_path


def trained_texts(dataset: CPTDataset, processor: ProcessorMixin, workers: int) -> list[str]:
    """What the labels of each document say, in any order."""
    loader = DataLoader(
        dataset, batch_size=1, num_workers=workers, collate_fn=CPTDataCollator(processor), shuffle=False
    )
    texts = []
    for batch in loader:
        labels = batch["labels"]
        texts.append(processor.tokenizer.decode(labels[labels >= 0]))
    return sorted(texts)


@pytest.mark.parametrize("workers", [0, 2, 8])
@pytest.mark.parametrize("rows_of", ["conversations", "markup"])
def test_documents_targets_and_counts_are_those_of_the_rows_for_any_number_of_workers(
    folder: Path, tiny_processor: ProcessorMixin, workers: int, rows_of: str
) -> None:
    if rows_of == "conversations":
        rows, documents = conversations()
    else:
        lines = [f"<IMG{n}><trainable_text>描述文本{n}</trainable_text>" for n in (1, 2)]
        rows = [{"text": "\n".join(lines), "images": ["甲.png", "乙.png"]}] * 12
        documents = [[("", False), ("描述文本1", True), ("\n", False), ("", False), ("描述文本2", True)]] * 12
    (folder / "a.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )

    dataset = CPTDataset(
        str(folder / "a.jsonl"), tiny_processor, max_length=512, packing=False, num_proc=workers
    )

    total = dataset.ledger.total
    assert total.documents["read"] == total.documents["used"] == len(rows)
    assert total.documents["cut_edges"] == 0
    wanted = counted(documents, tiny_processor)
    assert {key: total.tokens[key] for key in wanted} == wanted
    assert total.tokens["trimmed"] == total.tokens["targets_without_context"] == 0
    said = sorted(
        "".join(text for text, is_trained in one if is_trained) + "<|endoftext|>" for one in documents
    )
    assert trained_texts(dataset, tiny_processor, workers) == said
