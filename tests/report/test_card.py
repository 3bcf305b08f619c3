"""The model card: what it says, and that its code does what it says."""

import html
import json
import re
import shutil
from io import BytesIO
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from vlcpt.config.yaml import dump_config, load_config
from vlcpt.demo import base_path
from vlcpt.report.card import PLOT, Licence, RunFacts, escaped, model_card, read_run
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
    card = card_of(read_run(measured))

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


def test_a_name_that_the_user_wrote_is_shown_though_its_file_has_the_same(measured):
    (measured / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: secret.jsonl\noutput_dir: out\nuse_cpu: true\n"
        "eval_data: [{path: held.jsonl, name: held}]\nretention_data: private/old.jsonl\n"
    )
    for name in ("secret.jsonl", "held.jsonl", "private/old.jsonl"):
        (measured / name).parent.mkdir(exist_ok=True)
        (measured / name).write_text('{"text": "one"}\n')
    (measured / "config.yaml").write_text(dump_config(load_config(measured / "my.yaml"), measured))

    run = read_run(measured)

    assert [row[0] for row in run.evaluation.rows] == ["held", "source 2"]
    assert not re.search("secret|private", card_of(run))


def test_a_loss_alone_has_no_plot():
    assert plot_differences({"held": {"loss": 1.0, "base_loss": None}}) is None


def test_a_plot_takes_any_name():
    """A formula's dollar, characters that its font has not."""
    for name in ("a $x_ b$", "中文", "x" * 300):
        assert plot_differences({name: SET})[:4] == b"\x89PNG"


# --- text of others in Markdown ---

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![seen](https://a.b/x.png)",
    "[click](javascript:alert(1))",
    "<https://a.b>",
    "a | b \\| c |",
    "\\*a* __b__ _c_ ~~d~~ `e` ``f",
    "&lt;b&gt; &#60;b&#62;",
    "# no heading",
    "- no list",
    "12. no list",
    "> no quotation",
    "--- ===",
    "[1]: https://a.b",
    "$$x$$ \\\\(y\\\\)",
    "日本語 <b>中文</b>|",
)


def rendered(markdown):
    """The text that a reader sees, and the tags."""
    page = MARKDOWN.render(markdown)
    return html.unescape(re.sub(r"<[^>]*>", "", page)), set(re.findall(r"<(\w+)", page))


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    ("place", "tags"),
    [
        ("- {}\n", {"ul", "li"}),
        ("- Licence: {}. More\n", {"ul", "li"}),
        ("| a | b |\n|---|---|\n| {} | 1 |\n", {"table", "thead", "tbody", "tr", "th", "td"}),
    ],
)
def test_any_text_is_shown_as_it_is_wherever_the_card_has_it(text, place, tags):
    shown, found = rendered(place.format(escaped(text)))

    assert text in shown
    assert found == tags


@pytest.mark.parametrize("text", ["https://a.b/c", "see www.a.b", "ftp://a.b", "me@example.org"])
def test_an_address_in_a_text_is_not_what_the_hub_makes_a_link_of(text):
    """GitHub's Markdown, and the Hub's, has links without brackets."""
    assert rendered(str(escaped(text)))[0].strip() == text
    assert not re.search(r"(https?|ftp)://|www\.|\w@\w", str(escaped(text)))


@pytest.mark.parametrize(
    "text", ['new: it\'s 684 → 2.02 (-0.7%), a_b > c; "d" ÷ 3 & 4! #5', "-0.028 to 0.034", "中文：手册"]
)
def test_plain_text_can_be_read_in_the_file_too(text):
    assert str(escaped(text)) == text


def test_the_words_of_an_evaluation_hold_no_entity(measured):
    card = card_of(read_run(measured))

    assert "→" in card  # of the perplexity
    assert not re.search(r"&#?\w+;|\\", card)


def test_a_licences_address_is_a_link_and_another_text_is_none():
    def line(link):
        licence = Licence("mine", link)
        card = model_card("model", "me/mine", RunFacts(), base_model=None, licence=licence)
        return next(one for one in card.splitlines() if one.startswith("- Licence"))

    assert "- Licence: mine (<https://example.org/licence>)." in line("https://example.org/licence")
    assert rendered(line("javascript:<b>"))[1] == {"ul", "li"}
