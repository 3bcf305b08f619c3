"""Parameters counted without weights are those of the model that training loads."""

import subprocess
import sys
from pathlib import Path

import pytest

from vlcpt.config.schema import ModelConfig
from vlcpt.model.counting import adapter_shape, count_towers, empty_model
from vlcpt.model.loading import load_model
from vlcpt.model.tuning import tower_table

CONFIGS = [
    {"tuning": "lora"},
    {"tuning": "lora", "train_merger": True, "train_vision": True, "lora_towers": ("language", "vision")},
    {"tuning": "lora", "train_embeddings": True, "use_dora": True},
    {"tuning": "full"},
    {"tuning": "full", "train_language": False, "train_merger": True, "dtype": "bfloat16"},
    {"tuning": "qlora", "train_merger": True},
]


@pytest.mark.parametrize("layout", ["saved", "3B", "7B"], indirect=True)
@pytest.mark.parametrize("options", CONFIGS)
def test_the_counts_are_those_of_the_loaded_model(tiny_model_dir: Path, options: dict[str, object]) -> None:
    config = ModelConfig(str(tiny_model_dir), **options)
    counts = count_towers(empty_model(config), config).values()
    rows = tower_table(load_model(config))

    assert [one.trained for one in counts] == [row.trained for row in rows]
    assert sum(one.trained for one in counts) > 0
    if config.tuning == "full":
        assert [one.frozen + one.trained for one in counts] == [row.total for row in rows]
    else:  # adapters and copies stand beside weights that stay as they are
        assert [one.frozen for one in counts] == [row.total for row in rows]


@pytest.mark.parametrize(
    ("layout", "options", "matrices"),
    [
        ("saved", {"tuning": "full"}, 1),
        ("7B", {"tuning": "full"}, 1),
        ("3B", {"tuning": "full"}, 1),  # the one matrix is both
        ("3B", {"train_embeddings": True}, 1),
        ("3B", {"train_merger": True}, 0),
    ],
    indirect=["layout"],
)
def test_a_trained_matrix_that_makes_the_logits_is_counted_once(
    tiny_model_dir: Path, options: dict[str, object], matrices: int
) -> None:
    config = ModelConfig(str(tiny_model_dir), **options)
    model = empty_model(config)

    assert (
        count_towers(model, config)["language"].trained_head
        == matrices * model.get_input_embeddings().weight.numel()
    )


def test_the_frozen_weights_keep_the_configured_type(tiny_model_dir: Path) -> None:
    model = empty_model(ModelConfig(str(tiny_model_dir), dtype="bfloat16"))

    assert model.get_input_embeddings().weight.dtype.itemsize == 2
    assert model.device.type == "meta"


def test_only_the_language_towers_layers_are_packed(tiny_model_dir: Path) -> None:
    config = ModelConfig(str(tiny_model_dir), tuning="qlora")
    packed = {tower: one.packed for tower, one in count_towers(empty_model(config), config).items()}
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128

    assert packed == {"vision": 0, "merger": 0, "language": 2 * layer}


@pytest.mark.parametrize("layout", ["saved", "3B", "7B"], indirect=True)
@pytest.mark.parametrize("options", [one for one in CONFIGS if one["tuning"] == "lora"])
def test_an_adapters_own_shape_counts(
    tiny_model_dir: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    made = ModelConfig(str(tiny_model_dir), lora_r=4, lora_dropout=0.1, **options)
    load_model(made).save_pretrained(tmp_path)
    saved = ModelConfig(str(tiny_model_dir), adapter_name_or_path=str(tmp_path))

    assert adapter_shape(saved) == adapter_shape(made) == (4, True, made.use_dora)
    assert count_towers(empty_model(saved), saved) == count_towers(empty_model(made), made)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model could be loaded from this folder"):
        empty_model(ModelConfig(str(tmp_path)))


COUNTED = """
import sys
from vlcpt.config.schema import ModelConfig
from vlcpt.model.counting import count_towers, empty_model

config = ModelConfig(sys.argv[1], use_dora=True)
assert count_towers(empty_model(config), config)["language"].trained > 0
assert not {"peft", "transformers.trainer"} & sys.modules.keys()
"""


def test_counting_imports_neither_peft_nor_a_trainer(tiny_model_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, str(tiny_model_dir)], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
