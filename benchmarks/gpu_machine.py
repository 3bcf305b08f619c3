"""What ``gpu.py`` and its parts share: the file of findings, the machine, seconds and bytes of work."""

from __future__ import annotations

import inspect
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# What a part may fail with on a machine that lacks something: another release has no such name or argument,
# a kernel refuses a card, memory is short. Anything else is a mistake in these scripts, and ends them.
FAILURES = (
    *(ImportError, AttributeError, TypeError, ValueError, LookupError),
    *(RuntimeError, OSError, AssertionError),  # torch's own errors are RuntimeErrors
)
PACKAGES = (
    *("torch", "transformers", "accelerate", "peft", "datasets", "bitsandbytes", "deepspeed", "triton"),
    *("flash-attn", "kernels", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "numpy", "pillow", "vlcpt"),
)


class Findings:
    """What was found so far, in a file that is complete after every note.

    Args:
        path: Of the JSON file; read if it is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, object] = {"machine": {}, "parts": {}, "unproven": []}
        self.part = ""
        if path.is_file():
            self.values = json.loads(path.read_text(encoding="utf-8"))

    def note(self, name: str, value: object) -> None:
        """Note one finding of the part that runs."""
        parts = self.values["parts"]
        assert isinstance(parts, dict)
        parts.setdefault(self.part, {})[name] = value
        self.write()

    def unproven(self, what: str, why: str) -> None:
        """Note what did not run, and the reason."""
        listed = self.values["unproven"]
        assert isinstance(listed, list)
        listed.append({"what": f"{self.part}: {what}" if self.part else what, "why": why})
        self.write()

    @contextmanager
    def proving(self, what: str) -> Iterator[None]:
        """What is inside may fail in one of the ways of a machine; it is then unproven."""
        try:
            yield
        except FAILURES as error:
            self.unproven(what, reason(error))
            if not is_alive():  # an error of the GPU stays for the rest of the process
                raise SystemExit(f"{self.part}: the GPU no longer answers in this process") from error

    def write(self) -> None:
        """Write the file, completely or not at all."""
        beside = self._path.with_name(f"{self._path.name}.part")
        beside.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self._path)


def bridge_kernel(findings: Findings) -> None:
    """Let releases of torch before 2.14 run the varlen kernel, whose arguments have grown.

    vlcpt still proves it against PyTorch's attention before it is used.
    """
    import torch
    from torch.nn.attention import varlen

    plain = varlen.varlen_attn
    known = inspect.signature(plain).parameters
    if "enable_gqa" in known:
        return
    findings.unproven(
        "the release of torch that vlcpt asks for",
        f"torch {torch.__version__} is older; its varlen_attn was called with the arguments that it has",
    )

    def attend(
        *args: object,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,  # the kernel itself takes fewer heads of keys
    ) -> object:
        given = {"scale": scale, "window_size": window_size, "is_causal": window_size == (-1, 0)}
        if "window_size" in known:
            del given["is_causal"]
        return plain(*args, **{name: value for name, value in given.items() if name in known})

    varlen.varlen_attn = attend


def reason(error: BaseException) -> str:
    """The kind of an error and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'without a message'}"


def is_alive() -> bool:
    """Whether the device still computes; true without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return True
    try:
        return float(torch.ones(2, device="cuda").sum()) == 2
    except RuntimeError:
        return False


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def describe() -> dict[str, object]:
    """Versions, device, memory and settings that change what is measured."""
    import torch

    found: dict[str, object] = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["cores"] = len(os.sched_getaffinity(0))
    found["shared memory, GiB"] = round(_shared_memory() / 2**30, 2)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        found[name] = os.environ.get(name)
    found["cuda"], found["hip"] = torch.version.cuda, getattr(torch.version, "hip", None)
    found["cudnn"] = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
        found |= {
            "gpu": properties.name,
            "gpu memory, GiB": round(total / 2**30, 1),
            "gpu memory free, GiB": round(free / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "gpus": torch.cuda.device_count(),
        }
    return found


def _shared_memory() -> int:
    """Bytes of /dev/shm, through which batches come from workers; 0 if there is none."""
    try:
        held = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return held.f_frsize * held.f_blocks


def seconds(work: Callable[[], object], *, repeats: int = 7, limit: float = 2.0) -> float:
    """The median of a few calls, the first one not counted; fewer where they are slow."""
    found: list[float] = []
    while len(found) < 2 or (len(found) <= repeats and sum(found) < limit):
        wait()
        start = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def peak(work: Callable[[], object]) -> int | None:
    """Bytes that a piece of work holds at most on the GPU, beyond those held before; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    wait()
    return torch.cuda.max_memory_allocated() - before


def wait() -> None:
    """Until the GPU is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rounded(values: Mapping[str, float | int | None], digits: int = 4) -> dict[str, float | int | None]:
    """Floats with so many digits that count."""
    return {
        name: float(f"{value:.{digits}g}") if isinstance(value, float) else value
        for name, value in values.items()
    }
