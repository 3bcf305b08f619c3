import json
import re
from html import unescape
from pathlib import Path

import pytest
import yaml

from tests.browser import hostile_texts
from tests.processes import holding
from vlcpt.folder_locks import LOCK
from vlcpt.report.pages.run import picture_of, run_page, sections
from vlcpt.report.run_record import read_record

LEDGER = {
    "documents": {"read": 10, "used": 8, "dropped": {"medium": 2}},
    "tokens": {
        "read": 100,
        "targets": 40,
        "context": 30,
        "media": 20,
        "not_drawn": 0,
        "dropped": {"medium": 10},
    },
}


def write(folder, *, names=("new",), held="new", kept="old", **facts):
    """A whole run of 20 steps."""
    folder.mkdir(exist_ok=True)
    lines = [{"step": 0, f"eval_{held}_loss": 3.0, f"eval_{kept}_loss": 1.0}]
    for step in range(1, 21):
        of_sources = {f"loss/{name}": 3 - step / 10 for name in names}
        speed = {
            "targets_per_second": 100.0,
            "data_wait": 0.25,
            "seconds/forward": 0.5,
            "seconds/data_wait": 0.2,
        }
        rates = {"learning_rate/merger": 1e-4, "learning_rate/language": 1e-5}
        own = {"loss": 3 - step / 10, "loss_mean": 3 - step / 20, "grad_norm": 1.0, "peak_memory_gib": 2.0}
        lines.append({"step": step, **own, **of_sources, **speed, **rates, "fill": 0.99, "eta_seconds": 90})
    lines.append({"step": 20, f"eval_{held}_loss": 1.5, f"eval_{kept}_loss": 1.1})
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = dict.fromkeys(names, LEDGER)
    (folder / "ledger.json").write_text(json.dumps({"sources": sources, "total": LEDGER}))
    config = {"tuning": "lora", "model_name_or_path": "org/base", "seed": 7}
    config["retention_data"] = [{"path": "old.jsonl", "name": kept}]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    known = {"state": "finished", "steps_planned": 20, "seconds": 61.0, "versions": {"torch": "9.9"}}
    (folder / "run.json").write_text(json.dumps(known | facts))
    return folder


def add_reliance(folder, *ends, name="new"):
    """Evaluations of a set at steps 0 and 20 that say what blank images cost."""
    with (folder / "train_log.jsonl").open("a") as log:
        for step, value in zip((0, 20), ends, strict=True):
            numbers = {"loss": 2.0, "perplexity": 7.4, "blank_images_loss": 2.0 + value, "reliance": value}
            line = {f"eval_{name}_{key}": one for key, one in numbers.items()}
            log.write(json.dumps({"step": step, **line}) + "\n")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole run's page, with the folder above it."""
    folder = tmp_path_factory.mktemp("runs")
    page = run_page(write(folder / "run", names=("a" * 60, "b")))
    (folder / "page.html").write_text(page)
    return folder, page


def test_a_whole_run_has_every_picture(whole):
    _, page = whole

    titles = re.findall(r'<title id="[\w-]+-title">([^<]+)', page)
    assert titles == [
        *("Training loss", "Training loss by source", "Held-out loss", "Retention loss", "Targets a second"),
        *("Time of a step", "Data wait and use", "Most memory so far", "Learning rate", "Gradient norm"),
    ]
    assert "is missing" not in page
    for text in ("Where every token went", "org/base", "1 min 01 s", "3.00 → 1.50", "1.00 → 1.10", "9.9"):
        assert text in page


def test_the_ledger_is_drawn_in_full(whole):
    _, page = whole

    widths = [
        float(one) for one in re.findall(r'<rect class="fill k-[\w-]+" x="[\d.]+%" width="([\d.]+)%"', page)
    ]
    assert widths[:4] == [40, 30, 20, 10]
    assert "dropped: medium" in page


@pytest.mark.parametrize(
    ("gone", "says", "keeps"),
    [
        ("train_log.jsonl", "there are no curves", "Where every token went"),
        ("ledger.json", "it is not known where the tokens went", "Training loss"),
        ("config.yaml", "its settings are not known", "Training loss"),
        ("run.json", "how it ended", "Training loss"),
    ],
)
def test_without_a_file_the_rest_is_shown(tmp_path, gone, says, keeps):
    folder = write(tmp_path / "run")
    (folder / gone).unlink()

    page = run_page(folder)

    assert f"{gone} is missing: {says}" in page
    assert keeps in page


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"state": "failed", "message": "row 7 is bad (after step 3)"}, "row 7 is bad (after step 3)"),
        ({"state": "interrupted", "message": "By SIGTERM, after step 3."}, "By SIGTERM, after step 3."),
        ({"state": "running", "written": "2026-11-29T13:10:02+00:00"}, "as of 2026-11-29 13:10 UTC"),
        ({"state": None}, "neither an end nor a model is in its folder"),
    ],
)
def test_the_state_stands_on_top(tmp_path, facts, says):
    page = run_page(write(tmp_path / "run", **facts))

    head = page.partition("<main")[0]
    assert says in head
    assert f'class="state {facts["state"] or "not-known"}"' in head


def test_a_run_whose_process_is_gone_was_killed_and_has_no_time_spent_or_left(tmp_path):
    written = {"state": "running", "written": "2026-11-29T13:10:02+00:00", "seconds": 3.0}
    folder = write(tmp_path / "run", **written)
    with holding(folder) as (process, _):
        held = run_page(folder)
        process.kill()
        process.wait()
    killed = run_page(folder)
    (folder / LOCK).unlink()
    unknown = run_page(folder)

    left = "at the pace of the last steps, as of 2026-11-29 13:10 UTC"
    for page in (held, unknown):
        assert 'class="state running"' in page and left in page and "3 s" in page
    assert "3 s" not in killed  # when its page was written last, not when it ended
    assert "last written 2026-11-29 13:10 UTC; no process holds its folder any more" in killed
    assert 'class="state killed"' in killed and "at the pace of" not in killed


def test_facts_of_any_type_are_no_error(tmp_path):
    """The file may come from another version, or from a person."""
    odd = [None, True, -1, 1e400, "text", [], [1], {}, {"a": None}]
    keys = "state message started ended written seconds starts steps_planned towers versions memory"
    for value in odd:
        sets = {"new": {"loss": 1.0, "blank_images_loss": value}, "odd": value}
        sets["new"] |= {"intervals": {"blank": value}, "reliance": {"share_over_0.1": value}}
        folder = write(tmp_path / "run", **dict.fromkeys([*keys.split(), "command"], value))
        for name in ("ledger.json", "eval.json"):
            (folder / name).write_text(
                json.dumps(
                    {"sets": sets, "retention": value, "samples": value, "sources": value, "total": value}
                )
            )
        (folder / "train_log.jsonl").write_text("")  # its curves take time, and no part in this

        assert "How it was run" in run_page(folder)


def test_what_other_images_cost_is_drawn_on_one_scale_with_its_intervals(tmp_path):
    folder = write(tmp_path / "run")
    one = {
        "loss": 1.0,
        "shuffled_images_loss": 3.0,
        "blank_images_loss": 2.0,
        "intervals": {"blank": [0.5, 1.5]},
        "reliance": {"nats_per_target": 1.0, "share_over_0.1": 0.314},
    }
    (folder / "eval.json").write_text(json.dumps({"sets": {"new": one}}))

    page = run_page(folder)

    assert re.findall(r'class="value" x="([\d.]+)%" y="3" width="([\d.]+)%"', page) == [
        ("0.0", "100.0"),
        ("0.0", "50.0"),
    ]
    assert "+2.000" in page and "+1.000 (+0.500 to +1.500)" in page
    assert "new: 31% of targets get over 0.1 nats" in page
    assert 'class="whisker" x1="25.0%" x2="75.0%"' in page


def test_reliance_is_drawn_over_the_steps_beside_the_losses_and_said_in_words(tmp_path):
    page = run_page(add_reliance(write(tmp_path / "run"), 0.25, 1.5))

    titles = re.findall(r'<title id="[\w-]+-title">([^<]+)', page)
    assert titles[3:5] == ["Retention loss", "Does it read its images?"]
    words = re.findall(r'<desc id="reliance-desc">([^<]+)', page)
    assert words == [
        "new: from 0.25 at step 0 to 1.5 at step 20; lowest 0.25 at step 0, highest 1.5 at step 20."
    ]
    assert "0.250 → 1.50" in page
    assert "a blank image costs 1.500 nats a target, and 0.250 before training" in page


def test_the_memory_that_was_foreseen_is_drawn_beside_the_peak(tmp_path):
    folder = write(tmp_path / "run", memory={"said": "checkpointing is off", "foreseen_gib": 2.5})

    words = re.findall(r'<desc id="memory-desc">([^<]+)', run_page(folder))

    assert "of one process: from 2 at step 1 to 2 at step 20" in words[0]
    assert "foreseen for a device: from 2.5 at step 1 to 2.5 at step 20" in words[0]


def test_a_set_has_one_look_in_all_charts(tmp_path):
    folder = add_reliance(add_reliance(write(tmp_path / "run"), 0.1, 0.2), 0.3, 0.4, name="old")

    charts = {one.title: one for _, found in sections(read_record(folder)) for one in found}

    looks = {name: key for key, name in charts["Does it read its images?"].keys}
    assert looks.keys() == {"new", "old"}
    for title, name in (("Held-out loss", "new"), ("Retention loss", "old")):
        (stroke,) = set(re.findall(r"stroke-c\d", str(charts[title].svg)))
        assert stroke in looks[name]


def test_next_to_no_reliance_is_drawn_next_to_nothing(tmp_path):
    page = run_page(add_reliance(write(tmp_path / "run"), -0.002, 0.003))

    picture = page.partition('aria-labelledby="reliance-title')[2].partition("</svg>")[0]
    numbers = [float(one) for one in re.findall(r"<text[^>]*>(0\.\d+)</text>", picture)]
    assert max(numbers) >= 0.15


def test_a_set_named_like_blank_images_of_another_is_drawn_as_a_set(tmp_path):
    folder = write(tmp_path / "run", held="x_blank_images")

    page = run_page(folder)

    assert "held-out loss, x_blank_images" in page
    assert "Does it read its images?" not in page


def test_what_other_images_cost_is_shown_without_a_log(tmp_path):
    folder = write(tmp_path / "run")
    (folder / "train_log.jsonl").unlink()
    (folder / "eval.json").write_text(json.dumps({"sets": {"new": {"loss": 1.0, "blank_images_loss": 2.0}}}))

    assert "Does it read its images? At the end" in run_page(folder)


def test_a_negative_cost_is_drawn_to_the_left_of_nothing(tmp_path):
    folder = write(tmp_path / "run")
    one = {"loss": 2.0, "shuffled_images_loss": 1.0, "blank_images_loss": 3.0}
    (folder / "eval.json").write_text(json.dumps({"sets": {"new": one}}))

    bars = re.findall(r'class="value" x="([\d.]+)%" y="3" width="([\d.]+)%"', run_page(folder))

    assert bars == [("0.0", "50.0"), ("50.0", "50.0")]


def test_the_verdict_is_that_of_vlcpt_eval_and_continued_documents_are_shown(tmp_path):
    folder = write(tmp_path / "run")
    sample = {"document": "a.jsonl:1", "before": "Fig. 1 ", "continuation": "a pump", "truth": "a valve"}
    one = {"loss": 1.0, "base_loss": 1.5, "intervals": {"learnt": [0.4, 0.6]}}
    (folder / "eval.json").write_text(json.dumps({"sets": {"new": one}, "samples": {"new": [sample]}}))

    page = run_page(folder)

    assert '<li class="good">new: learnt. The loss is 1.000, 0.500 less than before' in page
    assert "<dt>model</dt><dd><b>a pump</b></dd><dt>truth</dt><dd>a valve</dd>" in page


def test_commands_on_the_page_name_the_run_as_it_was_named_and_no_path_of_this_machine(tmp_path, monkeypatch):
    folder = write(tmp_path / "my run")
    (folder / "adapter_model.safetensors").touch()
    (folder / "eval.json").write_text('{"sets": {"new": {"loss": null}}}')
    monkeypatch.chdir(tmp_path.parent)

    def command(named):
        return re.findall("`vlcpt eval (.*) --per_document", unescape(run_page(named)))

    whole = "'{0}/config.yaml' --checkpoint '{0}'"
    assert command(folder) == [whole.format("my run")]
    near = Path(tmp_path.name) / "my run"
    assert command(near) == [whole.format(near)]
    (folder / "adapter_model.safetensors").unlink()
    (folder / "config.yaml").unlink()
    assert command(near) == ["CONFIG --checkpoint CHECKPOINT"]


@pytest.mark.parametrize("loss", ["NaN", "Infinity", "null"])
def test_a_loss_that_is_no_number_is_said_to_be_none(tmp_path, loss):
    folder = write(tmp_path / "run")
    one = f'{{"loss": {loss}, "base_loss": 1.5, "intervals": {{"learnt": [0.4, 0.6]}}}}'
    (folder / "eval.json").write_text(f'{{"sets": {{"new": {one}}}}}')

    page = run_page(folder)

    assert '<li class="poor">new: cannot be judged: its loss is no finite number.' in page
    assert "new: learnt" not in page


def test_a_sample_has_its_pictures_and_the_names_of_what_has_none(tmp_path):
    folder = write(tmp_path / "run")
    small = ["", "data:image/png;base64,iVBORw=="]
    sample = {"document": "a.jsonl:1", "media": ["1.png", "2.png", "3.png"], "thumbnails": small}
    (folder / "eval.json").write_text(json.dumps({"samples": {"new": [sample]}}))

    page = run_page(folder)

    figure = f'<figure><img src="{small[1]}" alt=""><figcaption class="note">3.png</figcaption></figure>'
    assert re.findall("<figure><img.*</figure>", page) == [figure]
    assert "a.jsonl:1 · 1.png · 2.png</p>" in page


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/a.png",
        "data:text/html;base64,PGI+",
        "data:image/svg+xml;base64,PHN2Zz4=",
        'data:image/png;base64,AA==" onerror="window.hacked = 1',
        "data:image/png;base64,AA==\n",
        " data:image/png;base64,AA==",
        "data:image/png;base64," + "A" * 300_000,
    ],
)
def test_what_is_no_small_picture_is_not_shown(text):
    assert picture_of(text) == ""


def test_without_vlcpt_eval_the_verdict_is_that_of_the_runs_own_evaluations(whole):
    _, page = whole

    assert "<li>new: the loss fell by 1.500 to 1.500 (no interval was measured)" in page
    assert "<li>old: the loss rose by" in page
    assert page.count("What to change") == 1


def test_no_path_of_this_machine_is_on_the_page(whole):
    folder, page = whole

    assert str(folder) not in page


def test_hostile_names_run_nothing_and_load_nothing(tmp_path, browser, listener):
    texts = [text for text in hostile_texts(listener.port) if "\x00" not in text]
    folder = write(
        tmp_path / "run",
        names=texts,
        held=texts[0],
        kept=texts[1],
        message=" ".join(texts),
        command=" ".join(texts),
        versions=dict(zip(texts, texts, strict=True)),
        towers=[{"tower": text, "how": text, "dtype": text} for text in texts],
    )
    result = {"loss": 1.0, "blank_images_loss": 2.0}
    sample = {"before": texts[0], "continuation": texts[0], "media": texts, "thumbnails": texts}
    samples = {text: [{"document": text, **sample}] for text in texts}
    (folder / "eval.json").write_text(json.dumps({"sets": dict.fromkeys(texts, result), "samples": samples}))
    (folder / "dropped.jsonl").write_text(
        "".join(json.dumps({"id": one, "detail": one}) + "\n" for one in texts)
    )
    (tmp_path / "page.html").write_text(run_page(folder))

    browser.messages()
    browser.open(tmp_path / "page.html")

    assert browser.run("return window.hacked === undefined")
    assert browser.run("return [document.scripts.length, document.images.length, document.links.length]") == [
        0,
        0,
        1,
    ]
    assert browser.each(".verdict li", "one.textContent")[0].startswith(texts[0])
    assert listener.heard == []
    assert browser.messages() == []


@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_fits_its_window_and_breaks_no_policy(whole, browser, width):
    folder, _ = whole
    browser.messages()
    browser.open(folder / "page.html", width=width, dark=width == 390)

    assert browser.run("return document.documentElement.scrollWidth - innerWidth") <= 0
    assert browser.each(".chart", "one.getBoundingClientRect().height > 100") == [True] * 10
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert browser.messages() == []


def test_curves_have_the_colours_of_light_and_dark(whole, browser):
    folder, _ = whole
    colours = []
    for dark in (False, True):
        browser.open(folder / "page.html", dark=dark)
        colours.append(browser.each("path.stroke-c1", "getComputedStyle(one).stroke")[0])

    assert colours == ["rgb(0, 114, 178)", "rgb(86, 180, 233)"]
