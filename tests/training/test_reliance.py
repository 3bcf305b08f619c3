"""Tests of vlcpt/training/reliance.py: what images give each target, document by document."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import TEN, png
from vlcpt import CPTDataset, parse_markup
from vlcpt.data.documents import DocumentError
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.plan.split import split_stream
from vlcpt.training import reliance as reliance_module
from vlcpt.training.evaluate import EvalOptions, score_sets
from vlcpt.training.reliance import ImageNats
from vlcpt.training.step import sent


def test_a_document_alone_gets_what_it_gets_in_a_set(make_tiny_model, tiny_processor):
    model = make_tiny_model().eval()
    dataset = CPTDataset(TEN, tiny_processor, max_length=24)
    scores = score_sets(model, {"ten": dataset}, tiny_processor, keeps_targets=True)["ten"]
    asked = ImageNats(model, DocumentEncoder(tiny_processor), EvalOptions())

    for number in range(len(TEN)):
        document, stream = dataset.documents.encoded(number)
        found = asked(document, stream, split_stream(stream, 24, source=document.source))
        expected = scores.targets.of_document(number, len(stream))
        assert found == pytest.approx(expected, abs=1e-5, nan_ok=True)
        if not stream.media:
            assert np.nanmax(np.abs(found)) == 0


def test_a_document_whose_image_cannot_be_decoded_is_an_error(make_tiny_model, tiny_processor, tmp_path):
    (tmp_path / "cut.png").write_bytes(png(1)[:200])
    document = parse_markup("<image>seen", [str(tmp_path / "cut.png")])
    encoder = DocumentEncoder(tiny_processor)
    stream = encoder.tokens(document)

    asked = ImageNats(make_tiny_model(), encoder, EvalOptions())

    with pytest.raises(DocumentError, match=r"cut\.png"):
        asked(document, stream, split_stream(stream, 64))


@pytest.mark.slow
def test_captions_of_easy_vqa_need_their_image_at_colour_and_shape_and_nowhere_else(tmp_path):
    """A model is trained on them for that: a minute."""
    script, output = Path(__file__).parents[2] / "benchmarks/reliance.py", tmp_path / "reliance.json"

    done = subprocess.run([sys.executable, script, "--output", output], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    nats = json.loads(output.read_text())["nats"]
    for word in ("colour", "shape"):
        assert nats.pop(word) > 1
        assert nats.pop(f"{word}, first token") > 1
    assert nats.keys() == {"There", "is", "a", "in", "the", "picture", ".", "end of text"}
    assert max(map(abs, nats.values())) < 0.05


@pytest.mark.parametrize("as_bytes", [True, False])
def test_a_document_is_asked_with_bytes_only_where_it_may_be(
    make_tiny_model, tiny_processor, monkeypatch, as_bytes
):
    seen, dataset = [], CPTDataset(TEN, tiny_processor, max_length=24)
    monkeypatch.setattr(
        reliance_module, "sent", lambda batch, *rest: seen.append(batch) or sent(batch, *rest)
    )
    encoder = DocumentEncoder(tiny_processor)
    asked = ImageNats(make_tiny_model(), encoder, EvalOptions(pixel_bytes=as_bytes))

    for number in range(len(TEN)):
        document, stream = dataset.documents.encoded(number)
        asked(document, stream, split_stream(stream, 24, source=document.source))

    kinds = {batch["pixel_values"].dtype for batch in seen if "pixel_values" in batch}
    assert torch.float32 in kinds or as_bytes
    assert (torch.uint8 in kinds) == as_bytes  # images beside others are float32 either way
