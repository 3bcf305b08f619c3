"""The model card: what it says, and that its code does what it says."""

import html
import json
import re
import shutil
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from vlcpt.demo import base_path
from vlcpt.report.card import PLOT, Licence, RunFacts, model_card, read_run
from vlcpt.report.plot import plot_differences

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


# --- the evaluation ---

SET = {
    **{"loss": 1.0, "perplexity": 2.72, "targets": 50, "base_loss": 1.5, "shuffled_images_loss": 1.4},
    "blank_images_loss": 1.7,
    "intervals": {"loss": [0.9, 1.1], "learnt": [0.4, 0.6], "shuffled": [0.3, 0.5], "blank": [0.6, 0.8]},
}
EVALUATION = {"sets": {"held": SET, "old": {**SET, "base_loss": 0.9}}, "retention": ["old"]}


@pytest.fixture
def measured(tmp_path):
    """The folder of a run whose end was measured, its sources named by the user."""
    sources = "eval_data: [{path: a.jsonl, name: held}]\nretention_data: [{path: b.jsonl, name: old}]\n"
    (tmp_path / "config.yaml").write_text(sources)
    (tmp_path / "eval.json").write_text(json.dumps(EVALUATION))
    return tmp_path


def card_of(run):
    return model_card("model", "me/mine", run, base_model=None, licence=Licence())


def test_the_card_says_in_words_what_was_learnt_kept_and_seen(measured):
    card = html.unescape(card_of(read_run(measured)))

    assert "- held: learnt. The loss is 1.000, 0.500 less than before (95% interval 0.400 to 0.600)" in card
    assert "- held: read from its images: another document's image costs 0.400" in card
    assert "- old: forgotten." in card
    assert "| 95% interval | 0.300 to 0.500 | 0.300 to 0.500 |" in card
    assert "replay_share (with" not in card  # advice is for who trains, and not for who loads


def test_the_plot_goes_beside_the_card_and_is_an_image(measured):
    run = read_run(measured)

    assert f"]({PLOT})" in card_of(run)
    with Image.open(BytesIO(run.plot)) as image:
        assert image.format == "PNG"
        assert image.width > 800


def test_a_file_of_an_evaluation_goes_before_the_runs_own(measured):
    (measured / "eval.json").write_text(json.dumps({"sets": {"held": {**SET, "loss": 1.25}}}))

    run = read_run(measured, measured / "eval.json")

    assert [row[0] for row in run.evaluation.rows] == ["held"]
    assert "The loss is 1.250" in run.said[0]


def test_the_card_takes_what_eval_wrote_into_the_runs_folder(measured):
    """There the end of a run says that it be written."""
    (measured / "eval.json").write_text(json.dumps({"sets": {"held": {**SET, "loss": 1.125}}}))

    assert "The loss is 1.125" in read_run(measured).said[0]


def test_a_checkpoint_does_not_get_the_evaluation_of_the_end(measured):
    (measured / "checkpoint-2").mkdir()

    run = read_run(measured / "checkpoint-2")

    assert (run.evaluation, run.said, run.plot) == (None, (), None)


def test_sets_that_are_named_after_files_stay_unnamed_also_in_words_and_plot(measured):
    (measured / "config.yaml").write_text("eval_data: [{path: secret/held.jsonl}]\n")

    run = read_run(measured)

    assert "held" not in card_of(run)
    assert run.said[0].startswith("source 1: learnt.")


def test_a_loss_alone_has_no_plot():
    assert plot_differences({"held": {"loss": 1.0, "base_loss": None}}) is None


def test_a_plot_takes_any_name():
    """A formula's dollar, characters that its font has not."""
    for name in ("a $x_ b$", "中文", "x" * 300):
        assert plot_differences({name: SET})[:4] == b"\x89PNG"
