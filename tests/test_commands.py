"""Every command of READMEs, docs, examples and the notebook runs in a test, or is held with its reason.

In blocks, and within a sentence where it begins with vlcpt and leaves no place to fill in.

What begins with vlcpt, or hands over to it, is parsed by its own command line in either case, with known keys
and values. A command of vlcpt that is new on a page, and on neither list, runs here, in a folder with a run.
"""

import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from vlcpt.cli import app
from vlcpt.config.yaml import read_early
from vlcpt.demo import base_path, data_path

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "README_zh.md", "CONTRIBUTING.md", "vlcpt/demo/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
NOTEBOOK = ROOT / "examples/own_pictures.ipynb"  # tests/test_notebook.py runs all of it
PROGRAMS = (
    r"(?:vlcpt|torchrun|deepspeed|sbatch|docker|pip|python|hf|pytest|examples/launch/\S+|HOSTFILE=\S+) "
)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
# With an argument, or it only names a command and its option; CAPITALS, … and [ ] are places to fill in.
INLINE = re.compile(r"(?<!`)`(vlcpt [a-z]+ [^-`][^`]*)`(?!`)")
PLACES = re.compile(r"(?<![\w.-])[A-Z][A-Z_]+(?![\w.-])|[<>…\[\]]")

# A command, and the test that runs it: a file, and a name in it.
RUN = {
    "pip install -e .": ".ci/run, pip install",
    'pip install -e ".[test]"': ".ci/run, pip install",
    "pytest": ".ci/run, pytest",
    "vlcpt demo": 'tests/demo/test_run.py, "demo"',
    "vlcpt env": 'tests/test_cli.py, ["env"]',
    "vlcpt doctor --quick": "tests/runs/test_doctor_cli.py, --quick",
    "vlcpt doctor my.yaml --quick": "tests/runs/test_doctor_cli.py, --quick",
    "vlcpt check theirs.yaml": "tests/config/test_synonyms.py, theirs.yaml",
    "vlcpt check my.yaml": "tests/test_readme.py, commands(readme)",
    "vlcpt inspect my.yaml --rows 0:3": "tests/test_readme.py, commands(readme)",
    "vlcpt train my.yaml": "tests/test_readme.py, commands(readme)",
    "vlcpt eval my.yaml --checkpoint runs/manuals --output eval.json": (
        "tests/test_readme.py, commands(readme)"
    ),
    "vlcpt merge runs/manuals merged": "tests/test_readme.py, commands(readme)",
    "vlcpt push merged me/manuals --run runs/manuals": "tests/test_readme.py, --dry-run",
    "python benchmarks/gpu.py": "tests/test_gpu_benchmark.py, --tiny",
    "examples/launch/one_gpu.sh my.yaml": "tests/test_launch_scripts.py, one_gpu.sh",
    "examples/launch/one_node.sh my.yaml --deepspeed zero2": "tests/test_launch_scripts.py, one_node.sh",
    "HOSTFILE=hosts examples/launch/several_nodes.sh my.yaml --deepspeed zero3": (
        "tests/test_launch_scripts.py, several_nodes.sh"
    ),
    "vlcpt prepare my.yaml --output prepared --engine ray": 'tests/data/prepared/test_write.py, engine="ray"',
}
# What cannot run here: how such a command begins, and why.
HELD = {
    r"torchrun --nproc_per_node 8 ": "eight GPUs; two processes on the CPU run in tests/training",
    r'torchrun --nnodes "\$WORLD_SIZE"': "machines of a cluster; the arguments are parsed",
    r"sbatch ": "SLURM; tests/test_launch_scripts.py runs the script with a stand-in",
    r"docker ": "Docker, which is not here; the Dockerfile says so",
    r"vlcpt push runs/manuals(/\S+)? me/manuals( --(evaluation|base_model) .*)?$": (
        "a push; tests/hub has a stand-in"
    ),
    r"vlcpt train my.yaml --report_to swanlab ": "an account at SwanLab; transformers' own callback",
    r"vlcpt doctor my.yaml$": "parsed; with --quick it runs in tests/runs/test_doctor_cli.py",
    r"vlcpt prepare my.yaml --vision_cache features$": "frozen towers; runs in tests/runs/test_features.py",
    r"vlcpt --install-completion$": "it writes into the files of a shell at home",
    r"hf auth login$": "an account on the Hub",
    r"export [A-Z_]+=\S+$": "a setting of another program, and no command",
    r"pip install (modelscope|swanlab|scikit-learn scikit-image)$": "a package of others, from a registry",
    r"(ruff (format|check) \.|mypy)$": "a look at the code before a commit, which changes nothing that runs",
    r"modelscope download ": "ModelScope, over the network",
    r"tensorboard --logdir ": "a server that does not end",
    r"llamafactory-cli train ": "LLaMA-Factory, which is not installed; the page says that it was not run",
    r"swift sft ": "ms-swift, which is not installed; the page says that it was not run",
    r"vllm serve ": "vLLM, which needs a GPU; the page says that it was not run",
    r"python -m vlcpt.demo.build$": "17 minutes, and packages of others; the page says so",
    r"(python -m venv \.venv|\. \.venv/bin/activate)$": "an environment, which .ci/run makes for itself",
    r"\./(one_gpu|one_node|several_nodes)\.sh ": "GPUs; tests/test_launch_scripts.py runs the scripts",
}


@dataclass(frozen=True)
class Command:
    """A command as a page has it."""

    page: str
    text: str


def commands() -> list[Command]:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "code" for line in cell["source"]]
    found = [Command(NOTEBOOK.name, line[1:].strip()) for line in lines if line.startswith("!")]
    for path in PAGES:
        text = path.read_text("utf-8")
        inline = (" ".join(one.split()) for one in INLINE.findall(FENCE.sub("", text)))
        found += [Command(path.name, one) for one in inline if not PLACES.search(one)]
        for language, body in FENCE.findall(text):
            if language in ("bash", "sh", "console", "shell", ""):
                found += [Command(path.name, text) for text in parted(body, every=language != "")]
    for path in sorted((ROOT / "examples/launch").iterdir()):
        for line in re.findall(
            r"^# .*?((?:[A-Z]+=\S+ )*(?:\./\w+\.sh|sbatch|docker (?:run|build)) .*)$", path.read_text(), re.M
        ):
            found.append(Command(path.name, re.split(r"  | \(", line)[0].removesuffix(" \\")))
    return found


def parted(body: str, *, every: bool) -> Iterator[str]:
    """The commands of a block: without comments, prompts, and what a command printed."""
    for line in body.replace("\\\n", " ").splitlines():
        line = re.split(r"\s+#\s", line.strip())[0].removeprefix("$ ")
        if line and not line.startswith("#") and (every or re.match(PROGRAMS, line)):
            yield from (" ".join(one.split()) for one in line.split(" && "))


COMMANDS = commands()
TEXTS = sorted({command.text for command in COMMANDS})


def why_held(text: str) -> str | None:
    return next((reason for start, reason in HELD.items() if re.match(start, plain(text))), None)


def plain(text: str) -> str:
    """Without variables that are set for this command alone, if a script of examples/launch follows."""
    return re.sub(r"^(?:[A-Z]+=\S+ )+(?=\./)", "", text)


IN_NOTEBOOK = {command.text for command in COMMANDS if command.page == NOTEBOOK.name}
LEFT = [text for text in TEXTS if text not in RUN and text not in IN_NOTEBOOK and not why_held(text)]
HERE = [text for text in LEFT if text.startswith("vlcpt ")]
OURS = [
    text
    for text in TEXTS
    if re.search(r"(^|-m |--module )vlcpt (?!--)", text) and not text.startswith("docker build")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with my.yaml and its data."""
    folder = tmp_path_factory.mktemp("folder")
    lines = Path(data_path("new_train.jsonl")).read_text("utf-8").splitlines(keepends=True)
    for name, count in {"train": 120, "held_out": 4}.items():
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]), "utf-8")
    config = {
        "model_name_or_path": base_path(),
        "train_data": {"path": "train.jsonl", "name": "manuals", "media_root": data_path()},
        "eval_data": {"path": "held_out.jsonl", "name": "held_out", "media_root": data_path()},
        "output_dir": "runs/manuals",
        "max_length": 512,
        "max_steps": 2,
        "save_steps": 1,
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "report_to": "none",
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(config))
    (folder / "models").mkdir()
    (folder / "models/Qwen2.5-VL-3B-Instruct").symlink_to(base_path())
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """The same, with the run that was trained from it."""
    path = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(folder, path, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        done = CliRunner().invoke(app, ["train", "my.yaml"])
    assert done.exit_code == 0, done.output
    return path


def test_every_command_runs_in_a_test_or_is_held_with_its_reason():
    unknown = [one for one in COMMANDS if one.text in LEFT and one.text not in HERE]

    assert len(COMMANDS) > 80 and len(IN_NOTEBOOK) == 5
    assert unknown == []


def test_a_command_in_a_sentence_is_seen_unless_it_has_a_place_to_fill_in():
    text = (
        "`vlcpt eval a.yaml --output b`, `vlcpt merge CHECKPOINT OUTPUT`, `vlcpt check --decode`, "
        "`vlcpt train`"
    )

    found = [one for one in INLINE.findall(text) if not PLACES.search(one)]

    assert found == ["vlcpt eval a.yaml --output b"]
    assert {command.text for command in COMMANDS if command.page == "replay.md"} == {
        "vlcpt eval my.yaml --checkpoint runs/manuals/checkpoint-200"
    }


def test_what_is_said_to_run_is_on_a_page_and_in_its_test():
    for command, where in RUN.items():
        file, _, words = where.partition(", ")
        assert command in TEXTS, command
        assert words in (ROOT / file).read_text("utf-8"), where


@pytest.mark.parametrize("start", HELD)
def test_what_is_held_is_on_a_page(start):
    assert any(re.match(start, plain(text)) for text in TEXTS)


@pytest.mark.parametrize("text", OURS)
def test_our_own_command_line_takes_it(text, folder, monkeypatch):
    """Whatever follows the options is a known key with a value of its type."""
    monkeypatch.chdir(folder)
    words = shlex.split(without_redirection(text))
    name, *arguments = (
        words[words.index("vlcpt") + 1 :] if text.startswith("vlcpt") else after_launcher(words)
    )
    group = typer.main.get_command(app)
    outer = group.make_context("vlcpt", [name, *arguments])
    if name == "doctor" and arguments[:1] and arguments[0].startswith("--"):
        arguments = ["my.yaml", *arguments]

    context = group.commands[name].make_context(name, arguments, parent=outer)

    # Where a command takes no keys, its own parser has refused whatever is left.
    assert read_early(folder / "my.yaml", context.args).training is not None


def without_redirection(text: str) -> str:
    return text.partition(" > ")[0]


def after_launcher(words: Sequence[str]) -> list[str]:
    return list(words[len(words) - list(reversed(words)).index("vlcpt") :])


@pytest.mark.slow
@pytest.mark.parametrize("text", HERE)
def test_a_command_that_is_on_neither_list_runs(text, run, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder, symlinks=True)
    monkeypatch.chdir(folder)
    arguments = shlex.split(without_redirection(text))[1:]
    if arguments[0] == "train" and "--resume_from_checkpoint" not in arguments:
        shutil.rmtree(folder / "runs")
    if arguments[0] == "report" and "runs/a" in arguments:  # two runs to compare
        for name in ("a", "b"):
            shutil.copytree(folder / "runs/manuals", folder / "runs" / name)
    if "runs/manuals/checkpoint-200" in arguments:  # the run here has two steps
        shutil.copytree(folder / "runs/manuals/checkpoint-2", folder / "runs/manuals/checkpoint-200")
    if arguments[0] == "push" and arguments[1].startswith("runs/"):  # the base is a folder here
        arguments += ["--base_model", "org/base"]

    done = CliRunner().invoke(app, arguments)

    assert done.exit_code == 0, done.output
