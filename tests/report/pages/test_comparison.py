import json
import re
from pathlib import Path

from tests.report.pages.test_run import add_reliance, write
from vlcpt.report.pages.comparison import comparison_page, differences, distinct
from vlcpt.report.pages.run import run_page


def test_curves_of_runs_lie_over_each_other_by_name(tmp_path):
    page = comparison_page([write(tmp_path / "small"), write(tmp_path / "large")])

    titles = re.findall(r'<title id="[\w-]+-title">([^<]+)', page)
    assert titles == [
        *("Training loss", "Held-out loss: new", "Retention loss: old", "Targets a second"),
        *("Most memory so far", "Gradient norm"),
    ]
    assert len(re.findall(r"</svg>small</li>", page)) == len(re.findall(r"</svg>large</li>", page)) == 6


def test_settings_that_differ_are_listed_and_no_others(tmp_path):
    folders = [write(tmp_path / "a"), write(tmp_path / "b")]
    (folders[1] / "config.yaml").write_text(
        (folders[1] / "config.yaml").read_text().replace("seed: 7", "seed: 8")
    )

    page = comparison_page(folders)

    rows = re.findall(r'<tr><th scope="row">(\w+)</th><td>([^<]*)</td><td>([^<]*)</td></tr>', page)
    assert rows.count(("seed", "7", "8")) == 1
    assert not [row for row in rows if row[0] == "tuning"]


def test_the_order_of_keys_and_the_folder_are_no_difference():
    found = differences(
        [{"a": {"x": 1, "y": 2}, "output_dir": "p"}, {"a": {"y": 2, "x": 1}, "output_dir": "q"}]
    )

    assert found == []


def test_runs_of_one_name_are_told_apart():
    names = distinct([Path("one/out"), Path("two/out"), Path("two/out")])

    assert names[:2] == ["one/out", "two/out"]
    assert len({*names}) == 3


def test_a_run_without_files_is_compared_all_the_same(tmp_path):
    (tmp_path / "none").mkdir()
    failed = {"state": "failed", "message": "row <7> is bad"}

    page = comparison_page([write(tmp_path / "run", **failed), tmp_path / "none"])

    assert "none: train_log.jsonl is missing" in page
    assert "<b>run</b> failed: row &lt;7&gt; is bad" in page


def test_results_stand_side_by_side(tmp_path):
    folders = [write(tmp_path / "a"), write(tmp_path / "b", seconds=122)]
    one = {"loss": 1.0, "shuffled_images_loss": 1.5}
    (folders[1] / "eval.json").write_text(json.dumps({"sets": {"new": one}}))

    page = comparison_page(folders)

    cells = {
        label: re.findall(r"<td>([^<]*)</td>", row)
        for label, row in re.findall(r'<th scope="row">([^<]+)</th>(.*?)</tr>', page)
    }
    assert cells["held-out: new"] == ["3.00 → 1.50"] * 2
    assert cells["time"] == ["1 min 01 s", "2 min 02 s"]
    assert cells["other images cost: new"] == ["–", "+0.500"]


def test_reliance_of_runs_is_compared(tmp_path):
    runs = [add_reliance(write(tmp_path / "a"), 0.1, 1.5), add_reliance(write(tmp_path / "b"), 0.1, 0.02)]

    page = comparison_page([*runs, write(tmp_path / "none")])

    assert re.findall(r'<title id="[\w-]+-title">(Does[^<]+)', page) == ["Does it read its images? new"]
    row = page.partition("reliance on images: new</th>")[2].partition("</tr>")[0]
    assert re.findall(r"<td>([^<]*)</td>", row) == ["0.100 → 1.50", "0.100 → 0.020", "–"]


def test_the_wait_for_data_is_the_same_on_both_pages(tmp_path):
    folder = write(tmp_path / "run")
    with (folder / "train_log.jsonl").open("a") as log:
        log.write('{"step": 21, "data_wait": 0.99}\n')

    assert "median; 25% of the time waiting for data" in run_page(folder)
    assert re.search(r"waiting for data</th>\s*<td[^>]*>25%<", comparison_page([folder, folder]))
