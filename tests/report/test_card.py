"""The model card: what it says, and that its code does what it says."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vlcpt.demo import base_path
from vlcpt.report.card import Licence, RunFacts, model_card

# Of the image processor of Qwen2.5-VL on the Hub, which has no size.
QWEN = {
    **{"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2},
    **{"merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    **{"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"},
}


@pytest.fixture(params=["demo", "qwen"])
def base(request, tmp_path):
    """A model with limits of pixels in either spelling, and the side that it gives a square of 1120."""
    folder = Path(shutil.copytree(base_path(), tmp_path / "base"))
    if request.param == "qwen":
        (folder / "processor_config.json").unlink()
        (folder / "preprocessor_config.json").write_text(json.dumps(QWEN))
    return folder, {"demo": 448, "qwen": 1120}[request.param]


@pytest.mark.parametrize(
    ("limits", "large", "small"),
    [
        ({"max_pixels": 50176}, 224, 56),
        ({"min_pixels": 12544}, None, 112),
        ({"min_pixels": 12544, "max_pixels": 50176}, 224, 112),
        ({"max_pixels": 784}, 28, 28),  # below the processor's own other limit
        ({"min_pixels": 3640 * 3640}, 3640, 3640),  # above it
    ],
)
def test_the_cards_code_gives_the_processor_the_limits_that_were_trained_with(base, limits, large, small):
    folder, untouched = base
    card = model_card("model", str(folder), RunFacts(**limits), base_model=None, licence=Licence())
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    made = {}

    exec(code, made)

    def side(pixels: int) -> int:
        image = Image.new("RGB", (pixels, pixels))
        patches = made["processor"].image_processor(images=[image], return_tensors="pt")
        return int(patches["image_grid_thw"][0, 1]) * 14

    assert (side(56), side(1120)) == (small, large or untouched)
    video = made["processor"].video_processor.size
    assert limits.get("max_pixels") in (None, video["longest_edge"])
    assert limits.get("min_pixels") in (None, video["shortest_edge"])


def test_a_card_of_a_run_without_limits_leaves_the_processor_alone():
    card = model_card("model", "me/mine", RunFacts(), base_model=None, licence=Licence())

    assert "part.size" not in card and "_pixels" not in card
