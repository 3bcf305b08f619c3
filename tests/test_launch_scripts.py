"""The scripts in examples/launch: what they would start, and two of them really started on the CPU.

``torchrun``, ``deepspeed``, ``srun`` and ``vlcpt`` are stood in for by a script that writes down how it was
called. Their own parsers then read that, and vlcpt's own command line the rest.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.processes import run_on_ranks
from tests.ranks import run
from tests.support import wait_for
from vlcpt.cli import app
from vlcpt.demo import base_path, data_path
from vlcpt.demo.run import copy_inputs
from vlcpt.runs import train
from vlcpt.training.checkpoints.files import list_checkpoints

LAUNCH = Path(__file__).parents[1] / "examples/launch"
NOTE = "import json, os, sys\nprint(json.dumps([sys.argv, dict(os.environ)]))\n"
EXTRA = ("--learning_rate", "5e-5", "--max_steps", "3")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run's file whose name has a space in it."""
    path = tmp_path / "my run.yaml"
    path.write_text(
        f"model_name_or_path: {base_path()}\noutput_dir: out\nuse_cpu: true\n"
        f"train_data: {Path(data_path('new_train.jsonl'))}\n"
    )
    return path


def started(
    script: str, config: Path, *arguments: str, **environment: str
) -> tuple[list[str], dict[str, str]]:
    """How a script called the first of the programs, and the environment that it gave it."""
    programs = config.parent / "programs"
    programs.mkdir(exist_ok=True)
    for name in ("torchrun", "deepspeed", "srun", "vlcpt"):
        (programs / name).write_text(f"#!{sys.executable}\n{NOTE}")
        (programs / name).chmod(0o755)
    scontrol = programs / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames n[7-8]" ] && printf "n7\\nn8\\n"\n')
    scontrol.chmod(0o755)
    done = subprocess.run(
        ["bash", str(LAUNCH / script), str(config), *arguments],
        env={"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (command, *rest), seen = json.loads(done.stdout)
    return [Path(command).name, *rest], seen


def by_torchrun(command: list[str]) -> tuple[object, list[str]]:
    """torchrun's own reading of a command: its options, and the arguments of vlcpt."""
    from torch.distributed.run import parse_args

    assert command[0] == "torchrun"
    options = parse_args(command[1:])
    assert options.module and options.training_script == "vlcpt"
    return options, options.training_script_args


def by_deepspeed(command: list[str]) -> tuple[object, list[str]]:
    """deepspeed's own reading of a command."""
    from deepspeed.launcher.runner import parse_args

    assert command[0] == "deepspeed"
    options = parse_args(command[1:])
    assert options.module and options.user_script == "vlcpt"
    return options, options.user_args


def configuration(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """What vlcpt's command line would train with, by its own reading."""
    given = []
    monkeypatch.setattr(train, "train_run", lambda configs, *args, **kwargs: given.append(configs))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return given[0].training


def test_one_gpu_needs_no_launcher(config, monkeypatch):
    command, environment = started("one_gpu.sh", config, *EXTRA, GPU="3")

    assert command[0] == "vlcpt"
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert configuration(command[1:], monkeypatch).learning_rate == 5e-5


def test_one_gpu_with_a_launcher_is_one_process(config, monkeypatch):
    command, environment = started("one_gpu.sh", config, *EXTRA, GPU="3", LAUNCHER="torchrun")
    options, arguments = by_torchrun(command)
    assert options.standalone and options.nproc_per_node == "1"
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert configuration(arguments, monkeypatch).max_steps == 3

    command, environment = started("one_gpu.sh", config, *EXTRA, GPU="3", LAUNCHER="deepspeed")
    options, arguments = by_deepspeed(command)
    assert options.include == "localhost:3"
    assert "CUDA_VISIBLE_DEVICES" not in environment  # deepspeed would take it for its own
    assert configuration(arguments, monkeypatch).max_steps == 3


def test_one_node_takes_all_gpus_or_as_many_as_asked_for(config, monkeypatch):
    for asked, processes in (({}, "gpu"), ({"GPUS": "2"}, "2")):
        options, arguments = by_torchrun(started("one_node.sh", config, *EXTRA, **asked)[0])
        assert options.standalone and options.nproc_per_node == processes
        assert configuration(arguments, monkeypatch).max_steps == 3
    for asked, processes in (({}, -1), ({"GPUS": "2"}, 2)):
        command, _ = started("one_node.sh", config, *EXTRA, LAUNCHER="deepspeed", PORT="29507", **asked)
        options, arguments = by_deepspeed(command)
        assert (options.num_gpus, options.master_port) == (processes, 29507)
        assert configuration(arguments, monkeypatch).max_steps == 3


def test_several_nodes_meet_at_the_first_of_the_hostfile(config, monkeypatch):
    from deepspeed.launcher.runner import fetch_hostfile

    hostfile = config.parent / "hosts"
    hostfile.write_text("# three\n\nalpha slots=4  # the first\nbeta slots=4\ngamma slots=4\n")
    command, _ = started("several_nodes.sh", config, *EXTRA, HOSTFILE=str(hostfile))
    options, arguments = by_torchrun(command)
    assert (options.nnodes, options.nproc_per_node) == ("3", "4")
    assert (options.rdzv_backend, options.rdzv_endpoint) == ("c10d", "alpha:29500")
    assert configuration(arguments, monkeypatch).max_steps == 3

    command, _ = started("several_nodes.sh", config, *EXTRA, LAUNCHER="deepspeed")
    options, arguments = by_deepspeed(command)
    assert fetch_hostfile(options.hostfile) == {"node1": 8, "node2": 8}  # the one beside the script
    assert configuration(arguments, monkeypatch).max_steps == 3


def test_slurm_starts_one_torchrun_a_machine_and_goes_on_after_a_requeue(config, monkeypatch):
    command, environment = started(
        "slurm.sh",
        config,
        *EXTRA,
        **{"SLURM_JOB_NODELIST": "n[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"},
        SLURM_JOB_ID="77",
        SLURM_CPUS_PER_TASK="12",
    )
    assert environment["SRUN_CPUS_PER_TASK"] == "12"  # or srun would give each machine one core
    assert command[:2] == ["srun", "--kill-on-bad-exit=1"]
    options, arguments = by_torchrun(command[2:])
    assert (options.nnodes, options.nproc_per_node) == ("2", "4")
    assert (options.rdzv_endpoint, options.rdzv_id) == ("n7:29500", "77")
    training = configuration(arguments, monkeypatch)
    assert (training.resume_from_checkpoint, training.max_steps) == ("auto", 3)


STEP = """
import os, signal, sys, time
def end(*_):
    open(os.environ["NOTES"], "a").write("step got TERM\\n")
    time.sleep(0.3)
    sys.exit(int(os.environ["CODE"]))
signal.signal(signal.SIGTERM, end)
open(os.environ["NOTES"], "a").write("step began\\n")
time.sleep(float(os.environ["SECONDS_OF_STEP"]))
sys.exit(int(os.environ["CODE"]))
"""
SCONTROL = """#!/bin/sh
case $1 in
  show) [ "$2" = hostnames ] && echo localhost || echo "   JobState=$STATE Reason=None" ;;
  *) echo "scontrol $*" >> "$NOTES" ;;
esac
"""


class Job:
    """slurm.sh as sbatch would start it, with stand-ins for srun and scontrol, which keep notes."""

    def __init__(self, folder: Path, config: Path, srun: str, *arguments: str, **environment: str) -> None:
        programs = folder / "slurm"
        programs.mkdir(exist_ok=True)
        self._notes, self._log = folder / "notes", folder / "log"
        self._notes.touch()
        for name, text in (("srun", srun), ("scontrol", SCONTROL)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        known = {"SLURM_JOB_NODELIST": "n7", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1"}
        known |= {"SLURM_JOB_ID": "77", "NOTES": str(self._notes), "STATE": "RUNNING"}
        path = f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["bash", str(LAUNCH / "slurm.sh"), str(config), *arguments],
            env={**os.environ, **known, "PATH": path, **environment},
            stdout=self._log.open("ab"),  # as --open-mode=append
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[1],
            start_new_session=True,
        )

    @property
    def notes(self) -> list[str]:
        return self._notes.read_text().splitlines()

    @property
    def log(self) -> str:
        return self._log.read_text()

    def end(self) -> int:
        try:
            return self.process.wait(300)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "state", "code", "requeued"),
    [
        (signal.SIGUSR1, "RUNNING", 1, True),  # its time is nearly over
        (signal.SIGUSR1, "RUNNING", 143, True),
        (signal.SIGTERM, "PREEMPTED", 1, True),
        (signal.SIGTERM, "CANCELLED by 1000", 1, False),
        (signal.SIGUSR1, "RUNNING", 0, False),  # it was just done
    ],
)
def test_a_slurm_job_that_is_interrupted_goes_into_the_queue_again(
    tmp_path, config, number, state, code, requeued
):
    job = Job(
        tmp_path, config, f"#!{sys.executable}\n{STEP}", CODE=str(code), SECONDS_OF_STEP="60", STATE=state
    )
    wait_for(lambda: "step began" in job.notes, 20)
    job.process.send_signal(number)

    assert job.end() == code
    assert job.notes == ["step began", "step got TERM", *(["scontrol requeue 77"] if requeued else [])]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_slurm_job_that_fails_or_is_done_does_not(tmp_path, config, code):
    job = Job(tmp_path, config, f"#!{sys.executable}\n{STEP}", CODE=str(code), SECONDS_OF_STEP="0")

    assert job.end() == code
    assert job.notes == ["step began"]


def test_slurm_tells_the_script_and_not_the_steps_before_the_time_is_over():
    script = (LAUNCH / "slurm.sh").read_text()
    directives = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]

    assert {"--requeue", "--open-mode=append"} < set(directives)
    (reported,) = (line for line in directives if line.startswith("--signal="))
    assert re.fullmatch(r"--signal=B:USR1@(\d+)", reported)
    assert int(reported.rpartition("@")[2]) > 240  # what a save may take by default


def logged_steps(path: Path) -> list[int]:
    """The steps that were trained: evaluations and the summary stand in the log too."""
    whole, _, _ = (path.read_text() if path.exists() else "").rpartition(
        "\n"
    )  # the last line may be half written
    lines = [json.loads(line) for line in whole.splitlines()]
    return [line["step"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_a_slurm_job_really_goes_on_where_it_was_interrupted(tmp_path):
    config = copy_inputs(tmp_path / "demo", overwrite=False)
    options = ["--output_dir", str(tmp_path / "out"), "--max_steps", "60", "--logging_steps", "1"]
    options += ["--save_strategy", "no"]
    steps = tmp_path / "out/train_log.jsonl"
    # srun passes signals on to what it started
    srun = '#!/bin/bash\nshift\nexec "$@"\n'
    first = Job(tmp_path, config, srun, *options)
    wait_for(lambda: logged_steps(steps) or first.process.poll() is not None, 200)
    first.process.send_signal(signal.SIGUSR1)

    assert first.end() != 0
    assert first.notes == ["scontrol requeue 77"], first.log
    (saved,) = list_checkpoints(tmp_path / "out")
    step = int(saved.name.rpartition("-")[2])
    assert f"interrupted after step {step}: checkpoint-{step} is saved" in first.log
    assert step < 60

    second = Job(tmp_path, config, srun, *options)
    assert second.end() == 0, second.log
    assert second.notes == ["scontrol requeue 77"]  # once
    assert f"resuming from {saved}" in second.log
    assert sorted(set(logged_steps(steps))) == list(range(1, 61))


def test_deepspeed_puts_local_rank_before_the_command_and_vlcpt_reads_on(config, monkeypatch):
    """As its launcher was seen to do: ``-m vlcpt --local_rank=0 train …``."""
    from vlcpt.__main__ import main

    given = []
    monkeypatch.setattr(train, "train_run", lambda configs, *args, **kwargs: given.append(configs))
    monkeypatch.setattr(sys, "argv", ["vlcpt", "--local_rank=0", "train", str(config), "--max_steps", "3"])
    with pytest.raises(SystemExit) as ended:
        main()

    assert not ended.value.code
    assert given[0].training.max_steps == 3


def test_scripts_and_docs_say_how_long_the_launchers_wait_for_a_save():
    """Fails where a release of a launcher waits longer, or lets it be set: then they can say so."""

    def seconds(module: str, pattern: str) -> list[str]:
        root = importlib.util.find_spec(module.partition(".")[0]).submodule_search_locations[0]
        text = Path(root, *module.split(".")[1:]).with_suffix(".py").read_text("utf-8")
        return re.findall(pattern, text, re.DOTALL)

    waits = r"def terminate_process_tree.*?wait_procs\(children, timeout=(\d+)\)"
    assert seconds("deepspeed.launcher.launch", waits) == ["30"]
    agent = "torch.distributed.elastic.agent.server.local_elastic_agent"
    assert seconds(agent, r"shutdown_timeout: int = (\d+)") == ["30"]

    for script in LAUNCH.glob("*.sh"):
        assert "30 seconds" in script.read_text("utf-8"), script
    page = (LAUNCH.parents[1] / "docs/checkpoints.md").read_text("utf-8")
    assert "| `deepspeed` | 30 seconds, then SIGKILL | cannot be changed" in page
    assert "| `torchrun` | 30 seconds, then SIGKILL | `--shutdown-timeout 240`" in page


def test_the_dockerfile_copies_what_the_package_is_made_of_and_starts_vlcpt(tmp_path):
    """It has not been built; but pip makes the package of the files that it copies, and of no others."""
    root, text = LAUNCH.parents[1], (LAUNCH / "Dockerfile").read_text("utf-8")
    for sources, to in re.findall(r"^COPY (.*) (\S+)$", text, re.M):
        for name in sources.split():
            if (root / name).is_dir():
                shutil.copytree(root / name, tmp_path / to)
            else:
                shutil.copy(root / name, tmp_path / to)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(tmp_path / "installed"), "."], cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "vlcpt", "env"],
        cwd=tmp_path / "installed",
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "installed/vlcpt/deepspeed_configs/zero2.json").is_file()
    assert "NOT BUILT HERE" in text
    assert 'ENTRYPOINT ["vlcpt"]' in text  # a shell would keep the signal to itself


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_a_script_without_a_configuration_says_how_it_is_used(script):
    done = subprocess.run(["bash", str(LAUNCH / script)], capture_output=True, text=True)

    assert done.returncode != 0
    assert f"usage: {'sbatch ' if script == 'slurm.sh' else ''}{script} CONFIG" in done.stderr


@pytest.mark.parametrize("script", ["one_gpu.sh", "one_node.sh", "several_nodes.sh"])
def test_an_unknown_launcher_is_refused(script):
    done = subprocess.run(
        ["bash", str(LAUNCH / script), "my.yaml"],
        env={**os.environ, "LAUNCHER": "mpirun"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 2
    assert "LAUNCHER=mpirun: " in done.stderr


@pytest.mark.slow
@pytest.mark.alone
def test_processes_without_a_gpu_stop_before_they_write(config):
    """accelerate 1.15 would let each train alone there, into one folder."""
    config.write_text(config.read_text().replace("use_cpu: true", "use_cpu: false"))
    done = run_on_ranks("vlcpt", "train", str(config), CUDA_VISIBLE_DEVICES="")

    assert done.returncode == 2
    assert "started 2 processes, but there is no GPU here" in done.stdout
    assert not (config.parent / "out").exists()


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_processes_really_train_on_the_cpu(launcher, tmp_path):
    config = copy_inputs(tmp_path / "demo", overwrite=False)
    shutil.copytree(LAUNCH, tmp_path / "launch")
    programs = str(Path(sys.executable).parent)  # torchrun and deepspeed of this environment
    options = ["--output_dir", str(tmp_path / "out"), "--max_steps", "3", "--logging_steps", "1"]
    done = run(
        ["bash", str(tmp_path / "launch/one_node.sh"), str(config), *options],
        **{"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "LAUNCHER": launcher, "GPUS": "2"},
        PORT="29513",
    )

    assert done.returncode == 0, done.stdout
    assert done.stdout.count("2 processes, DDP") == 1
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.yaml", "ledger.json", "train_log.jsonl", "checkpoint-3"} <= written
    assert {"adapter_model.safetensors", "tokenizer.json"} <= written
    assert logged_steps(tmp_path / "out/train_log.jsonl") == [1, 2, 3]
