"""benchmarks/gpu.py without a GPU: every part runs at small shapes, and what cannot run is listed."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vlcpt import load_processor
from vlcpt.report.memory import MemoryEstimate
from vlcpt.runs import memory
from vlcpt.runs.data import RunData
from vlcpt.runs.memory import Choice

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PARTS = ["attention", "patches", "loss", "lora-4096", "lora-8192", "full-4096", "full-8192"]


@pytest.fixture
def script(monkeypatch):
    """A function that imports a script of the folder, as python does for its siblings."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def imported(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield imported
    for name in ("gpu", "gpu_machine", "gpu_kernels", "gpu_training"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, object]:
    """What one run of all parts found."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is unproven without a GPU")
def test_every_part_runs_at_small_shapes(found):
    assert list(found["parts"]) == PARTS
    only_on_gpus = ("the kernel is for GPUs", "the peak of this device is not known", "there is no GPU")
    assert [one for one in found["unproven"] if not one["why"].startswith(only_on_gpus)] == []
    assert found["machine"]["torch"] == torch.__version__.partition("+")[0]

    for part in PARTS[3:]:
        measured = found["parts"][part]
        assert measured["losses"][-1] < measured["losses"][0]  # it trains
        assert measured["steps counted"] >= 3
        assert measured["foreseen"]["total"] > 0
        assert 0 <= measured["data wait, share"] < 1
    assert found["parts"]["lora-4096"]["the kernels that took most of a step"]
    for head in ("frozen", "trained"):
        loss = found["parts"]["loss"][f"{head} head, 40 targets"]
        assert {"logits at once", "chunks of 128", "torch"} < set(loss["methods"])
        assert loss["fastest that is right"] in loss["methods"]
    assert found["parts"]["patches"]["bfloat16, 64 patches, frozen"]["used"] in ("conv", "linear")


def test_what_fails_in_a_way_of_machines_is_unproven_and_the_rest_goes_on(script, tmp_path):
    findings = script("gpu_machine").Findings(tmp_path / "gpu.json")
    findings.part = "loss"
    with findings.proving("a kernel"):
        raise RuntimeError("no kernel image is available\nand more")
    findings.note("seconds", 1)

    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["unproven"] == [
        {"what": "loss: a kernel", "why": "RuntimeError: no kernel image is available"}
    ]
    assert written["parts"] == {"loss": {"seconds": 1}}


def test_a_mistake_of_the_script_is_none(script, tmp_path):
    findings = script("gpu_machine").Findings(tmp_path / "gpu.json")

    with pytest.raises(ZeroDivisionError), findings.proving("a kernel"):
        _ = 1 / 0


def test_a_part_that_ends_its_process_is_unproven_and_the_next_one_runs(script, tmp_path, monkeypatch):
    """Each part writes what it did; the first one is killed in its work."""
    gpu = script("gpu")
    child = tmp_path / "child.py"
    child.write_text(
        f"import os, sys, time, pathlib; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from gpu_machine import Findings\n"
        "names = sys.argv[sys.argv.index('--run') + 1].split(',')\n"
        "findings = Findings(pathlib.Path(sys.argv[sys.argv.index('--output') + 1]))\n"
        "for name in names:\n"
        "    findings.part = name\n"
        "    findings.values['running'] = {'part': name, 'since': time.time()}\n"
        "    findings.note('began', True)\n"
        "    if name == 'attention':\n"
        "        os.abort()\n"
        "    if name == 'patches':\n"
        "        time.sleep(60)\n"
        "    findings.values['done'] = [*findings.values.get('done', []), name]\n"
        "    findings.write()\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(child))
    monkeypatch.setitem(gpu.PARTS, "patches", 1)
    path = tmp_path / "gpu.json"

    gpu.run_group(["attention", "patches", "loss"], path, tmp_path, [], gpu.time.time() + 60)

    written = json.loads(path.read_text())
    assert list(written["parts"]) == ["attention", "patches", "loss"]
    assert [one["what"] for one in written["unproven"]] == [
        "attention: the rest of it",
        "patches: the rest of it",
    ]
    crashed, slow = (one["why"] for one in written["unproven"])
    assert crashed.startswith("its process ended with exit code -6")
    assert slow == "it took longer than 1 seconds"
    assert written["done"] == ["attention", "patches", "loss"]


def test_where_no_time_is_left_parts_are_unproven(script, tmp_path):
    gpu, path = script("gpu"), tmp_path / "gpu.json"

    gpu.run_group(["attention", "loss"], path, tmp_path, [], gpu.time.time())

    assert json.loads(path.read_text())["unproven"] == [
        {"what": "attention: the rest of it", "why": "no time was left"},
        {"what": "loss: the rest of it", "why": "no time was left"},
    ]


def test_the_limits_of_the_parts_and_of_their_starts_stay_under_eight_minutes(script):
    gpu = script("gpu")

    assert [name for group in gpu.GROUPS for name in group] == list(gpu.PARTS) == PARTS
    assert sum(gpu.PARTS.values()) + 15 * len(gpu.GROUPS) <= gpu.MINUTES * 60 < 8 * 60


def test_the_varlen_kernel_of_an_older_torch_gets_the_arguments_that_it_has(script, tmp_path, monkeypatch):
    from torch.nn.attention import varlen

    given = []

    def older(q, k, v, cu_q, cu_k, max_q, max_k, *, is_causal=False):
        given.append(is_causal)

    monkeypatch.setattr(varlen, "varlen_attn", older)
    machine = script("gpu_machine")
    findings = machine.Findings(tmp_path / "gpu.json")
    machine.bridge_kernel(findings)

    varlen.varlen_attn(1, 2, 3, 4, 5, 6, 7, scale=0.1, window_size=(-1, 0), enable_gqa=True)
    varlen.varlen_attn(1, 2, 3, 4, 5, 6, 7, scale=0.1, window_size=(-1, -1), enable_gqa=False)

    assert given == [True, False]
    assert findings.values["unproven"][0]["what"] == "the release of torch that vlcpt asks for"


@pytest.fixture
def gpu_of_80_gib(monkeypatch):
    """What torch would say of a GPU with 60 GiB free, of which a run used 30 GiB at most."""
    answers = {
        **{"is_available": True, "mem_get_info": (60 * 2**30, 80 * 2**30), "get_device_name": "H100"},
        **{"memory_reserved": 3 * 2**30, "memory_allocated": 2**30, "max_memory_reserved": 33 * 2**30},
        **{"max_memory_allocated": 31 * 2**30, "empty_cache": None, "synchronize": None},
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)


def estimate(gib: int) -> MemoryEstimate:
    return MemoryEstimate("learning", gib * 2**30, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("chosen", "said"), [(Choice("activation checkpointing is off: it fits", 3.5), str), (None, bool)]
)
def test_what_is_foreseen_can_be_written_whether_checkpointing_was_chosen_or_given(
    script, tmp_path, monkeypatch, chosen, said
):
    training, path = script("gpu_training"), tmp_path / "gpu.json"
    training.write_inputs(tmp_path, tiny=True)
    configs = training._configs(tmp_path, training.Plan("lora", 256, tiny=True))
    processor = load_processor(configs.model.model_name_or_path)
    monkeypatch.setattr(memory, "choose_checkpointing", lambda *args: chosen)
    findings = script("gpu_machine").Findings(path)
    findings.part = "lora-256"

    training._foresee(findings, configs, RunData(configs, processor).train(), processor)

    written = json.loads(path.read_text())["parts"]["lora-256"]
    assert isinstance(written["checkpointing"], said)
    assert written["foreseen"]["total"] > 0


def test_a_run_that_does_not_fit_is_not_tried(script, tmp_path, gpu_of_80_gib):
    training = script("gpu_training")
    findings = script("gpu_machine").Findings(tmp_path / "gpu.json")
    findings.part = "full-8192"

    assert training._fits(findings, estimate(55))
    assert not training._fits(findings, estimate(59))
    assert findings.values["unproven"] == [
        {"what": "full-8192: the run", "why": "it does not fit: 59.0 GiB foreseen, 62.0 GiB free"}
    ]


def test_the_peak_is_compared_with_the_estimate_without_what_was_there_before(
    script, tmp_path, gpu_of_80_gib
):
    training = script("gpu_training")
    findings = script("gpu_machine").Findings(tmp_path / "gpu.json")
    findings.part = "lora-4096"

    training._note_memory(findings, estimate(33), training._held())

    assert findings.values["parts"]["lora-4096"]["memory"] == {
        **{"peak": 30 * 2**30, "foreseen": 33 * 2**30, "off": 0.1},
        **{"reserved": 33 * 2**30, "used of the device": 20 * 2**30},
    }


def test_the_log_of_a_run_on_a_known_gpu_gives_its_share_of_the_peak(script, tmp_path):
    training = script("gpu_training")
    findings = script("gpu_machine").Findings(tmp_path / "gpu.json")
    findings.part = "lora-4096"
    phases = {"data_wait": 0.01, "forward": 0.3, "backward": 0.6, "optimizer": 0.09}
    log = tmp_path / "train_log.jsonl"
    log.write_text(
        "".join(
            json.dumps(
                {"step": step, "loss": 9.0, "targets_per_second": 1000.0, "mfu": mfu}
                | {f"seconds/{name}": value for name, value in phases.items()}
            )
            + "\n"
            for step, mfu in enumerate((0.01, 0.4, 0.5, 0.42))
        )
    )
    plan = training.Plan("lora", 4096, warm=1)

    training._note_speed(findings, log, training.Meter(plan, findings), plan)

    part = findings.values["parts"]["lora-4096"]
    assert part["mfu"] == {"median": 0.42, "least": 0.4, "most": 0.5}
    assert part["data wait, share"] == 0.01
    assert findings.values["unproven"] == []
