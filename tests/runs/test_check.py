"""``vlcpt check``: what it counts, what it finds, what it writes, and how it exits."""

from __future__ import annotations

import json
import os
import re
from io import BytesIO, StringIO
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
from rich.console import Console
from transformers import ProcessorMixin
from typer.testing import CliRunner

from tests.processes import holding
from tests.support import avi, png
from vlcpt.cli import app
from vlcpt.config.yaml import load_config
from vlcpt.data.plan import plan
from vlcpt.data.plan.ledger import SourceLedger
from vlcpt.data.plan.plan import enter_used
from vlcpt.demo import base_path
from vlcpt.runs.check import check_run
from vlcpt.runs.prepare import prepare_run
from vlcpt.runs.train import train_run

Row = dict[str, object]
GOOD: list[Row] = [
    {"text": "<image> a <trainable_text>valve</trainable_text>", "images": ["a.png"]},
    {"text": "<video> a <trainable_text>pump</trainable_text>", "videos": ["v.avi"]},
    {"text": "one <trainable_text>two</trainable_text>"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Media of every fate: whole, cut, and broken in the middle."""
    (tmp_path / "a.png").write_bytes(png(1, 112, 84))
    (tmp_path / "cut.png").write_bytes(png(2)[:-30])
    (tmp_path / "v.avi").write_bytes(avi(1))
    (tmp_path / "cut.avi").write_bytes(avi(2)[:-700])
    jpeg = BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (84, 84, 3), dtype=np.uint8)).save(
        jpeg, "JPEG"
    )
    (tmp_path / "cut.jpg").write_bytes(jpeg.getvalue()[:-200])
    data = bytearray(png(3, 112, 112))
    data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    (tmp_path / "rotten.png").write_bytes(data)
    video = bytearray(avi(3))
    frame = video.index(b"\xff\xd8", len(video) // 2)
    video[frame : frame + 4000] = bytes(4000)  # several of them
    (tmp_path / "rotten.avi").write_bytes(video)
    (tmp_path / "cut.mp4").write_bytes(mp4()[:-100])
    return tmp_path


def mp4() -> bytes:
    file, rng = BytesIO(), np.random.default_rng(0)
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8, width=64, height=64)
        stream.pix_fmt = "yuv420p"
        for _ in range(12):
            frame = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return file.getvalue()


def write(folder: Path, rows: list[Row], extra: str = "") -> Path:
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = folder / "my.yaml"
    config.write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: train.jsonl\noutput_dir: out\nmax_length: 96\n"
        f"use_cpu: true\ndataloader_num_workers: 0\n{extra}\n"
    )
    return config


def check(config: Path, *options: str, width: int = 120, **arguments: object) -> tuple[bool, str]:
    output = StringIO()
    whole = check_run(
        load_config(config, options),
        console=Console(file=output, width=width),
        **arguments,  # type: ignore[arg-type]
    )
    return whole.is_complete, output.getvalue()


def ledger(folder: Path) -> dict[str, object]:
    return json.loads((folder / "out/ledger.json").read_text())


def dropped(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "out/dropped.jsonl").read_text().splitlines()]


# Exit codes


def test_whole_data_exit_with_0(folder: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(write(folder, GOOD))])

    assert result.exit_code == 0, result.output
    assert "Every document would be used." in result.output


@pytest.mark.parametrize(
    "row",
    [
        {"text": "<image> x", "images": ["none.png"]},
        {"text": 5},
        {"text": "<trainable_text>open"},
        {"text": "no <trainable_text></trainable_text>target"},
    ],
    ids=["medium", "row", "markup", "without targets"],
)
def test_a_document_that_would_be_lost_exits_with_1(folder: Path, row: Row) -> None:
    result = CliRunner().invoke(app, ["check", str(write(folder, [*GOOD, row]))])

    assert result.exit_code == 1, result.output
    assert "1 would be lost" in result.output and "train.jsonl:4" in result.output


def test_a_wrong_configuration_exits_with_2(folder: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(write(folder, GOOD, "max_lenght: 3"))])

    assert result.exit_code == 2
    assert "Did you mean max_length?" in result.output


def test_a_missing_file_is_one_message(folder: Path) -> None:
    config = write(folder, GOOD)
    (folder / "train.jsonl").unlink()
    result = CliRunner().invoke(app, ["check", str(config)])

    assert result.exit_code == 2
    assert "no such file" in result.output and "Traceback" not in result.output


# Counts


def test_media_tokens_are_those_of_the_processor_for_every_image_and_video(
    folder: Path, tiny_processor: ProcessorMixin
) -> None:
    rng, rows, images, videos = np.random.default_rng(0), [], [], []
    for number in range(20):
        width, height = (int(side) for side in rng.integers(20, 400, 2))
        name = f"{number}.{('png', 'jpg', 'webp', 'gif', 'bmp', 'tiff')[number % 6]}"
        picture = PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        picture.save(folder / name)
        images.append(picture)
        rows.append({"text": "<image> <trainable_text>x</trainable_text>", "images": [name]})
    for number, (frames, side) in enumerate([(8, 56), (16, 84), (33, 112), (5, 140)]):
        (folder / f"{number}.avi").write_bytes(avi(number, frames=frames, width=side))
        with av.open(str(folder / f"{number}.avi")) as container:
            videos.append(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
        rows.append({"text": "<video> <trainable_text>x</trainable_text>", "videos": [f"{number}.avi"]})

    whole, _ = check(write(folder, rows), "--max_length", "4096")

    merge = tiny_processor.image_processor.merge_size**2
    expected = 0
    for picture in images:  # as training encodes it: the whole processor, pixels and all
        expected += int(tiny_processor.image_processor([picture])["image_grid_thw"].prod()) // merge
    for frames in videos:
        made = tiny_processor.video_processor(
            [frames.transpose(0, 3, 1, 2)], do_sample_frames=True, fps=2.0, video_metadata=[metadata(frames)]
        )
        expected += int(made["video_grid_thw"].prod()) // merge
    assert whole
    assert expected > 1000
    assert ledger(folder)["total"]["tokens"]["media"] == expected


def metadata(frames: np.ndarray) -> dict[str, object]:
    return {"total_num_frames": len(frames), "fps": 8.0, "frames_indices": None, "duration": len(frames) / 8}


def test_the_ledger_is_the_one_that_training_writes(folder: Path) -> None:
    config = write(folder, GOOD, "max_steps: 1")
    check(config)
    checked = ledger(folder)
    train_run(load_config(config), Console(file=StringIO()))

    assert ledger(folder) == checked


@pytest.mark.parametrize("command", ["check", "train"])
def test_an_account_that_does_not_balance_stops_the_command(
    folder: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_a_token(account: SourceLedger, lines: np.ndarray, times: np.ndarray) -> None:
        enter_used(account, lines, times)
        account.tokens["context"] -= 1

    monkeypatch.setattr(plan, "enter_used", lose_a_token)
    result = CliRunner().invoke(app, [command, str(write(folder, GOOD, "max_steps: 1"))])

    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)  # a fault of vlcpt, which keeps its trace
    assert "the ledger of 'train' does not balance: " in str(result.exception)
    assert not (folder / "out/ledger.json").exists()
    assert not list(folder.glob("out/*.safetensors"))


def test_packs_fill_and_the_targets_of_each_source_are_shown(folder: Path) -> None:
    (folder / "more.jsonl").write_text('{"text": "four more <trainable_text>words</trainable_text>"}\n' * 30)
    config = write(folder, GOOD)
    config.write_text(config.read_text().replace("train.jsonl", "[train.jsonl, more.jsonl]"))
    _, text = check(config)
    shown, found = " ".join(text.split()), ledger(folder)
    targets = [found["sources"][name]["tokens"]["targets"] for name in ("train", "more")]

    assert found["packs"] > 1
    assert f"packs {found['packs']}" in shown
    assert f"{100 * found['fill']:.1f}%" in shown
    assert len(set(targets)) == 2
    assert f"targets {targets[0]} {targets[1]} {sum(targets)}" in shown


@pytest.mark.parametrize(
    "options",
    [
        ["--num_train_epochs", "3"],
        ["--gradient_accumulation_steps", "2", "--num_train_epochs", "3"],
        ["--per_device_train_batch_size", "2", "--num_train_epochs", "2.5"],
        ["--max_steps", "4"],
    ],
)
def test_the_steps_are_those_of_the_trainer(folder: Path, options: list[str]) -> None:
    config = write(folder, [{"text": f"{n} <trainable_text>two {n}</trainable_text>"} for n in range(21)])
    settings = [*options, "--packing", "false", "--learning_rate", "0"]
    _, text = check(config, *settings)
    trainer = train_run(load_config(config, settings), Console(file=StringIO()))
    (line,) = [line for line in text.splitlines() if "steps in all" in line]

    assert int(line.split()[-1]) == trainer.state.max_steps


def test_more_processes_take_fewer_steps(folder: Path) -> None:
    config = write(folder, [{"text": f"{n} <trainable_text>two</trainable_text>"} for n in range(16)])
    _, one = check(config, "--packing", "false", "--num_train_epochs", "1")
    _, eight = check(config, "--packing", "false", "--num_train_epochs", "1", num_processes=8)

    assert "1 epoch" in one and "1 epochs" not in one
    found = [
        [line.split()[-1] for line in text.splitlines() if "steps an epoch" in line] for text in (one, eight)
    ]
    assert found == [["16"], ["2"]]


def test_shares_are_shown_as_asked_and_as_realised(folder: Path) -> None:
    (folder / "general.jsonl").write_text('{"text": "what it knew before"}\n' * 8)
    extra = "replay_data: [{path: general.jsonl, name: general}]\nreplay_share: 0.5"
    rows = [{"text": f"{n} <trainable_text>one two three</trainable_text>"} for n in range(20)]
    _, text = check(write(folder, rows, extra))
    lines = [line.split() for line in text.splitlines()]
    (realised,) = [line[3:] for line in lines if line[:3] == ["share", "of", "targets"]]
    (asked,) = [line[1:] for line in lines if line[:1] == ["asked"]]

    assert asked == ["–", "50%"]
    assert [abs(int(share.removesuffix("%")) - 50) < 5 for share in realised] == [True, True]


@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("1", 0)])
def test_the_format_that_was_chosen_is_reported_once(folder: Path, rank: str, times: int) -> None:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    config = write(folder, [{"messages": turns}])
    result = CliRunner().invoke(app, ["check", str(config)], env={"RANK": rank})

    reported = "format messages was found, because the first rows have messages of role and content, e.g. of"
    assert result.exit_code == 0, result.output
    assert (
        result.stderr.count(f"vlcpt: {reported} train. Set format of a source to read it otherwise.") == times
    )
    again = CliRunner().invoke(app, ["check", str(config)], env={"RANK": rank})
    assert again.stderr.count(reported) == times  # in one process, too
    assert "Logging error" not in result.stderr + again.stderr


def test_the_longest_documents_are_named(folder: Path) -> None:
    rows = [
        {"text": "<trainable_text>" + "7 " * n + "</trainable_text>", "id": f"doc-{n}"} for n in (3, 30, 9)
    ]
    _, text = check(write(folder, rows))
    (line,) = [line for line in text.splitlines() if "longest documents" in line]

    assert "doc-30" in line


# Broken media


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.avi", "cut.mp4"])
def test_a_cut_file_is_found_without_decoding(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr("vlcpt.data.encode.vision.read_image", decoded)
    monkeypatch.setattr("vlcpt.data.encode.vision.read_video", decoded)
    # Some packs of what will be used are loaded after all is found, to time it.
    monkeypatch.setattr("vlcpt.runs.check.seconds_to_load", lambda *ignored: 1.0)
    kind = "video" if name.endswith(("avi", "mp4")) else "image"
    whole, _ = check(write(folder, [*GOOD, {"text": f"<{kind}> x", f"{kind}s": [name]}]))

    assert not whole
    (one,) = dropped(folder)
    assert one["reason"] == "medium" and one["line"] == 4
    assert name in one["detail"] and "cut short" in one["detail"]


@pytest.mark.parametrize("name", ["rotten.png", "rotten.avi"])
def test_a_broken_middle_is_found_by_decoding_only(folder: Path, name: str) -> None:
    kind = "video" if name.endswith("avi") else "image"
    config = write(folder, [*GOOD, {"text": f"<{kind}> x", f"{kind}s": [name]}])

    assert check(config)[0]
    assert not check(config, decode=True)[0]
    (one,) = dropped(folder)
    assert name in one["detail"]


def test_whole_media_pass_decoding(folder: Path) -> None:
    assert check(write(folder, GOOD), decode=True)[0]


@pytest.mark.parametrize(
    ("limit", "line"),
    [
        ("max_file_bytes: 300", 1),
        ("max_image_pixels: 9000", 1),
        ("max_video_frames: 3", 2),
        ("max_video_pixels: 3000", 2),
    ],
)
def test_the_limits_of_media_files_are_those_of_the_configuration(
    folder: Path, limit: str, line: int
) -> None:
    assert check(write(folder, GOOD))[0]
    whole, _ = check(write(folder, GOOD, limit))

    assert not whole
    first = dropped(folder)[0]
    assert (first["line"], first["reason"]) == (line, "medium")
    assert limit.partition(":")[0] in first["detail"]


# Bad rows


def test_bad_rows_are_all_counted_whatever_on_bad_data_says(folder: Path) -> None:
    rows = [*GOOD, *[{"text": 5}] * 150, *[{"text": "<trainable_text>open"}] * 3]
    whole, text = check(write(folder, rows, "on_bad_data: error"))

    assert not whole
    assert ledger(folder)["total"]["documents"]["dropped"] == {"row": 150, "markup": 3}
    assert "150 × row:" in text and "3 × markup:" in text


def test_messages_that_differ_in_names_and_numbers_only_are_folded(folder: Path) -> None:
    rows = [*GOOD, *[{"text": "<image> x", "images": [f"gone-{n}.png"]} for n in range(9)]]
    _, text = check(write(folder, rows))

    assert text.count("does not exist") == 1
    assert "9 × medium: images: 'gone-0.png'" in text
    assert "train.jsonl:6 and 6 more" in text


def test_data_without_one_usable_row_are_shown_too(folder: Path) -> None:
    whole, text = check(write(folder, [{"text": 5}] * 4))

    assert not whole
    assert "4 × row:" in text
    assert ledger(folder)["total"]["documents"]["read"] == 4


def test_overlong_documents_that_would_stop_training_are_counted(folder: Path) -> None:
    rows = [*GOOD, {"text": "word " * 200}]
    whole, text = check(write(folder, rows, "on_overlong: error"))

    assert not whole
    assert "longer than max_length 96, and training would stop at the first" in text


def test_documents_without_a_target_are_shown_what_gives_their_format_some(folder: Path) -> None:
    turns = (
        [{"from": "human", "value": "a"}],
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    )
    rows: list[Row] = [{"conversations": one} for one in turns]
    whole, text = check(write(folder, rows))

    assert not whole
    assert (
        "1 document without a target. Targets are the assistant's turns: check roles and loss switches"
        in text
    )
    assert "trainable" not in text


def test_held_out_data_are_read_as_well(folder: Path) -> None:
    (folder / "held.jsonl").write_text('{"text": "fine"}\n{"text": "<image>", "images": ["cut.png"]}\n')
    whole, text = check(write(folder, GOOD, "eval_data: held.jsonl"))

    assert not whole
    assert "of held, 1 would be lost" in text and "held.jsonl:2" in text
    (one,) = dropped(folder)
    assert (one["source"].rpartition("/")[2], one["line"], one["reason"]) == ("held.jsonl", 2, "medium")
    assert json.loads((folder / "out/ledger.json").read_text())["total"]["documents"]["dropped"] == {}


def test_it_is_said_that_an_evaluation_set_is_drawn(folder: Path) -> None:
    (folder / "held.jsonl").write_text('{"text": "fine"}\n' * 5)
    _, text = check(write(folder, GOOD, "eval_data: held.jsonl\neval_max_documents: 2"))

    assert re.search(r"held: 2 documents with \d+ targets to measure, drawn from 5\n", text)


def test_held_out_data_that_are_trained_are_named(folder: Path) -> None:
    _, text = check(write(folder, GOOD, "eval_data: [{path: ./train.jsonl, name: held}]"))

    assert "held: the same data is trained" in " ".join(text.split())


def test_held_out_data_from_which_prepared_training_data_were_made_are_named(folder: Path) -> None:
    (folder / "other.jsonl").write_text('{"text": "another"}\n')
    config = write(folder, GOOD)
    prepare_run(load_config(config), folder / "prepared", console=Console(file=StringIO()))
    named = "eval_data: [{path: train.jsonl, name: held}, {path: other.jsonl, name: apart}]"
    lines = config.read_text().replace("train_data: train.jsonl", "train_data: prepared")
    config.write_text(f"{lines}{named}\n")

    _, text = check(config)

    assert "held: the same data is trained" in " ".join(text.split())
    assert "apart: the same" not in text and "apart, " not in text


# Where it writes


def test_training_goes_on_in_a_folder_that_holds_a_check_only(folder: Path) -> None:
    config = write(folder, GOOD, "max_steps: 1")
    check(config)

    train_run(load_config(config), Console(file=StringIO()))


def test_a_runs_own_ledger_is_not_touched(folder: Path) -> None:
    config = write(folder, GOOD)
    (folder / "out").mkdir()
    (folder / "out/config.yaml").write_text("# a run")
    (folder / "out/ledger.json").write_text("{}")
    _, text = check(config)

    assert (folder / "out/ledger.json").read_text() == "{}"
    assert json.loads((folder / "out/check/ledger.json").read_text())["total"]["documents"]["used"] == 3
    assert "holds a run" in text


def test_no_weights_are_needed(folder: Path) -> None:
    base = folder / "base"
    base.mkdir()
    for file in Path(base_path()).iterdir():
        if file.suffix != ".safetensors":
            (base / file.name).write_bytes(file.read_bytes())
    config = write(folder, GOOD)
    config.write_text(config.read_text().replace(str(base_path()), str(base)))

    assert check(config)[0]


# What it shows


def test_the_memory_of_a_device_is_shown(folder: Path) -> None:
    _, text = check(write(folder, GOOD))

    assert "memory of one device, estimated" in text
    assert "most at once" in text and "CUDA itself takes about 1 GiB more" in " ".join(text.split())


def test_offloading_shows_the_computers_own_memory(folder: Path) -> None:
    _, text = check(write(folder, GOOD, "deepspeed: zero2_offload\nbf16: true"))

    assert "offloaded, per device" in text


@pytest.mark.parametrize("width", [60, 120])
def test_no_line_is_wider_than_the_terminal(folder: Path, width: int) -> None:
    output = StringIO()
    console = Console(file=output, width=width, force_terminal=True, color_system=None)
    rows = [*GOOD, {"text": "<image> x", "images": ["cut.png"]}]
    check_run(load_config(write(folder, rows)), console=console)

    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= width
    assert not [line for line in lines if "…" in line]  # nothing is shortened


def test_the_command_takes_its_options(folder: Path) -> None:
    config = write(folder, [*GOOD, {"text": "<image> x", "images": ["rotten.png"]}])
    arguments = ["check", str(config), "--decode", "--num_processes", "4", "--max_length", "128"]
    result = CliRunner().invoke(app, arguments, env={**os.environ, "COLUMNS": "120"})

    assert result.exit_code == 1, result.output
    assert "4 processes × 1 × 1" in result.output and "rotten.png" in result.output


def test_a_check_beside_a_run_that_has_only_begun_does_not_take_its_ledgers_place(folder: Path) -> None:
    config = write(folder, GOOD)
    with holding(folder / "out"):
        check(config)
        assert sorted(path.name for path in (folder / "out").iterdir()) == [".vlcpt.lock", "check"]


def loading_lines(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, gpu: str | None
) -> list[str]:
    """What check says of workers, where a pack takes 1.5 seconds."""
    for module in ("check", "speed"):
        monkeypatch.setattr(f"vlcpt.runs.{module}.seconds_to_load", lambda *ignored: 1.5)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, GOOD)) + "\n")
    (folder / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: rows.jsonl\noutput_dir: out\nmax_length: 256\n"
        "use_cpu: true\n"
    )
    shown = StringIO()
    configs = load_config(folder / "my.yaml", list(overrides))
    check_run(configs, gpu=gpu, console=Console(file=shown, width=300))
    return [line for line in shown.getvalue().splitlines() if " worker" in line]


def test_without_a_gpu_one_line_says_how_many_workers_keep_up_with_a_step_of_a_second(folder, monkeypatch):
    wanted = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3")
    (line,) = loading_lines(folder, monkeypatch, *wanted, gpu=None)

    assert "loads a pack in 1.5 s, so a GPU whose step of 6 packs takes 1 s needs 9 workers" in line
    assert "(dataloader_num_workers is 2)" in line, "what is set now, and not what is needed"
    assert line.endswith("--gpu NAME says how many yours needs")


def test_without_a_name_the_gpu_of_this_machine_is_foreseen(folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")

    assert loading_lines(folder, monkeypatch, gpu=None) == loading_lines(
        folder, monkeypatch, gpu="NVIDIA H200"
    )


def test_a_gpu_that_is_not_known_gets_the_line_of_none(folder, monkeypatch):
    none = loading_lines(folder, monkeypatch, gpu=None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")

    assert loading_lines(folder, monkeypatch, gpu=None) == none
    assert len(none) == 1
