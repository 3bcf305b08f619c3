"""Which model is examined in place of the run's base, and on which documents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vlcpt.runs.doctor.base
from vlcpt import CPTDataset, ModelConfig, load_model
from vlcpt.runs.doctor.base import prepare_base
from vlcpt.runs.doctor.documents import documents, long_documents

CPU = torch.device("cpu")


def test_a_small_base_is_examined_itself(tiny_model_dir: Path, tiny_processor, tmp_path: Path) -> None:
    base = prepare_base(ModelConfig(str(tiny_model_dir)), tiny_processor, tmp_path, CPU, quick=True)

    assert (base.folder, base.weights, base.has_all_layers) == (str(tiny_model_dir), "its own", True)
    assert not any(tmp_path.iterdir())


def test_of_a_large_base_few_layers_of_full_width_are_examined(
    tiny_model_dir: Path, tiny_processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlcpt.runs.doctor.base, "SMALL", 1000)
    monkeypatch.setattr(vlcpt.runs.doctor.base, "_FEWEST", 1)
    base = prepare_base(ModelConfig(str(tiny_model_dir)), tiny_processor, tmp_path, CPU, quick=True)

    assert (base.layers, base.all_layers, base.weights) == ((1, 1), (2, 2), "random")
    model = load_model(ModelConfig(base.folder, tuning="full"))
    assert sum(one.numel() for one in model.parameters()) == base.parameters
    assert model.config.text_config.hidden_size == 64


@pytest.mark.parametrize(("memory", "whole"), [(10 * 2**20, True), (2**20, False)])
def test_it_depends_on_memory_whether_all_layers_fit(
    tiny_model_dir: Path, tiny_processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory, whole
) -> None:
    monkeypatch.setattr(vlcpt.runs.doctor.base, "_memory", lambda device: memory)
    monkeypatch.setattr(vlcpt.runs.doctor.base, "_FEW", 1)

    assert (
        prepare_base(
            ModelConfig(str(tiny_model_dir)), tiny_processor, tmp_path, CPU, quick=False
        ).has_all_layers
        == whole
    )


def test_documents_have_every_medium_weights_and_names_of_their_own(tiny_processor) -> None:
    rows = documents(40)
    dataset = CPTDataset(rows, tiny_processor, max_length=4096, packing=False)

    assert len({row["id"] for row in rows}) == len(dataset) == 40
    assert dataset.modalities == ("image", "video")
    weights = {float(one) for number in range(40) for one in dataset[number][0].loss_weights}
    assert weights == {0.0, 0.5, 1.0, 3.0}
    assert any(dataset[number][0].pixel_values is None for number in range(5))


@pytest.mark.parametrize("max_length", [96, 256, 512])
def test_long_documents_fill_packs(tiny_processor, max_length: int) -> None:
    rows = long_documents(max_length, 4 * max_length, characters=2.0)
    dataset = CPTDataset(rows, tiny_processor, max_length=max_length)

    tokens, targets, media = dataset.pack_sizes().sum(axis=0).tolist()
    assert tokens > 3 * max_length
    assert 0.5 < media / tokens < 0.9  # in the reference document 0.75
    assert 0.05 < targets / tokens < 0.4
    assert dataset.ledger.fill > 0.75
