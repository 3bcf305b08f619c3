"""What a GPU makes of vlcpt: one command, under eight minutes, no data, no network, no weights.

    python benchmarks/gpu.py                              # writes gpu.json
    python benchmarks/gpu.py --parts attention,loss       # some of the parts
    python benchmarks/gpu.py --tiny                       # small shapes, also on a CPU: does the script run?

The parts, each with a limit of its own:

    attention    which kernels a run uses; the varlen kernel against PyTorch's attention, right and how fast
    patches      the patch embedding as Conv3d and as the equal linear layer
    loss         the loss in chunks, at once, at every token, and by torch's linear_cross_entropy
    lora-4096    LoRA at the 3B's shapes with random weights in bfloat16, packs of 4,096 tokens: share of the
                 peak (model FLOPs utilisation), where the time goes, data wait, peak memory and what
                 `vlcpt check` foresaw, the kernels that took most of a step
    lora-8192    the same with packs of 8,192
    full-4096    the same in full: float32 masters and Adam, about 50 GB
    full-8192

The file is complete after every finding, so that a run that is cut short leaves what it had. What a machine
or a release lacks is listed under "unproven" with the reason; the exit code is 0 all the same. Parts run in
processes of their own: one that hangs or crashes ends alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gpu_machine import Findings

# Seconds, once its process has started; together with the starts less than eight minutes.
PARTS = {
    **{"attention": 45, "patches": 30, "loss": 60},
    **{"lora-4096": 75, "lora-8192": 65, "full-4096": 75, "full-8192": 65},
}
# Parts of one process: what one leaves on the GPU is not the next one's.
GROUPS = (("attention", "patches", "loss"), ("lora-4096", "lora-8192"), ("full-4096", "full-8192"))
MINUTES, START = 7.75, 90


# --- in the process of a group ---


def run_parts(names: Sequence[str], findings: Findings, folder: Path, options: argparse.Namespace) -> None:
    """Run parts one after the other; what fails in one is unproven."""
    import gpu_machine

    if not findings.values["machine"]:
        findings.values["machine"] = gpu_machine.describe()
    with findings.proving("the varlen kernel of torch"):
        gpu_machine.bridge_kernel(findings)
    for name in names:
        findings.part = name
        findings.values["running"] = {"part": name, "since": time.time()}
        findings.write()
        start = time.perf_counter()
        with findings.proving("all of it"):
            run_part(name, findings, folder, options)
        findings.note("seconds", round(time.perf_counter() - start, 1))
        findings.values["done"] = [*_list(findings, "done"), name]
    findings.part = ""
    findings.values.pop("running", None)
    findings.write()


def run_part(name: str, findings: Findings, folder: Path, options: argparse.Namespace) -> None:
    """One part."""
    tuning, _, tokens = name.partition("-")
    if not tokens:
        import gpu_kernels

        shapes = gpu_kernels.TINY if options.tiny else gpu_kernels.Shapes()
        getattr(gpu_kernels, name)(findings, shapes)
        return
    from gpu_training import Plan, train

    # A kill would lose the step that runs; so no step begins in the last part of the time.
    plan = Plan(
        tuning,
        int(tokens),
        seconds=0.5 * PARTS[name],
        workers=options.workers,
        profiles=int(tokens) == 4096,  # the kernels of longer packs are the same
    )
    if options.tiny:
        plan = replace(plan, tokens=plan.tokens // 16, tiny=True, steps=5, warm=1)
    train(findings, folder, plan)


# --- in the process that was started ---


def run_group(names: Sequence[str], path: Path, folder: Path, given: Sequence[str], end: float) -> None:
    """Run parts in another process, and the rest of them in a fresh one where it ends early."""
    left = list(names)
    while left:
        why = _run_process(left, path, folder, given, end)
        findings = Findings(path)
        running = findings.values.pop("running", None)
        assert running is None or isinstance(running, dict)
        done = _list(findings, "done")
        rest = [one for one in left if one not in done]
        if rest:
            failed = str(running["part"]) if running else rest[0]
            findings.part = failed
            findings.unproven("the rest of it", why)
            findings.values["done"] = [*done, failed]
            findings.write()
        left = [one for one in rest if one not in _list(findings, "done")]


def _run_process(names: Sequence[str], path: Path, folder: Path, given: Sequence[str], end: float) -> str:
    """Wait for a process that runs parts, or end it; why it did not do all of them."""
    if time.time() >= end:
        return "no time was left"
    command = [sys.executable, __file__, "--run", ",".join(names), "--folder", str(folder)]
    log = folder / "log.txt"
    with log.open("ab") as file:
        started = time.time()
        process = subprocess.Popen(
            [*command, "--output", str(path), *given],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its loader workers end with it
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                # Several GPUs in one process are refused.
                "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
            },
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if why := _overdue(path, started, end):
                    return why
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["without a message"]
    return f"its process ended with exit code {process.returncode}: {last[0][:300]}"


def _overdue(path: Path, started: float, end: float) -> str:
    """Why a process is to end now; empty if it may go on."""
    now = time.time()
    if now > end:
        return f"the {MINUTES} minutes were over"
    running = Findings(path).values.get("running")
    if not isinstance(running, dict):
        return f"it had not started after {START} seconds" if now - started > START else ""
    limit = PARTS[running["part"]]
    return f"it took longer than {limit} seconds" if now - float(running["since"]) > limit else ""


def _list(findings: Findings, name: str) -> list[str]:
    found = findings.values.get(name, [])
    assert isinstance(found, list)
    return found


def lines(found: Mapping[str, object]) -> Iterator[str]:
    """What was found, for a person; all numbers are in the file."""
    parts, listed = found["parts"], found["unproven"]
    assert isinstance(parts, dict)
    assert isinstance(listed, list)
    for name, part in parts.items():
        yield f"{name} ({part.get('seconds', '?')} seconds)"
        for key, value in part.items():
            if key not in ("seconds", "losses", "said at the start", "the kernels that took most of a step"):
                yield from _shown(key, value)
        yield ""
    yield f"{len(listed)} unproven:"
    yield from (f"  {one['what']}: {one['why']}" for one in listed)


def _shown(name: str, value: object) -> Iterator[str]:
    """One finding; a table of methods has a line for each."""
    if isinstance(value, dict) and isinstance(methods := value.get("methods"), dict):
        yield f"  {name}: {value['fastest that is right']} is the fastest that is right"
        for method, one in methods.items():
            yield f"    {method}: {_plain(one)}"
    else:
        yield f"  {name}: {_plain(value)}"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items() if one is not None)
    is_large = isinstance(value, int) and not isinstance(value, bool) and value >= 2**24
    return f"{value / 2**20:,.0f} MiB" if is_large else str(value)  # type: ignore[operator]


def main() -> None:
    """Run the parts, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small shapes, also on a CPU")
    parser.add_argument("--workers", type=int, help="loader workers; default: as many as `vlcpt check` names")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_parts(options.run.split(","), Findings(options.output), options.folder, options)
        return
    asked = options.parts.split(",")
    if unknown := [one for one in asked if one not in PARTS]:
        parser.error(f"--parts: {', '.join(unknown)} is none of {', '.join(PARTS)}")
    path, start = options.output.absolute(), time.time()
    path.unlink(missing_ok=True)
    findings = Findings(path)
    findings.values["command"] = " ".join(sys.argv)
    findings.values["started"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
    findings.values["tiny"] = options.tiny
    findings.write()
    given = ["--tiny"] * options.tiny
    given += [] if options.workers is None else [f"--workers={options.workers}"]
    with tempfile.TemporaryDirectory() as folder:
        for group in GROUPS:
            names = [one for one in group if one in asked]
            run_group(names, path, Path(folder), given, start + MINUTES * 60)
        findings = Findings(path)
        findings.values.pop("done", None)
        findings.values["seconds"] = round(time.time() - start, 1)
        findings.values["log"] = (Path(folder) / "log.txt").read_text(errors="replace").splitlines()[-40:]
        findings.write()
    print(*lines(findings.values), sep="\n")
    print(f"{findings.values['seconds']} seconds; all numbers are in {path}")


if __name__ == "__main__":
    main()
