"""Versions and devices, for a bug report; needs torch alone, so that it runs where other packages do not."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from vlcpt import __version__

PACKAGES = (
    *("torch", "torchvision", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "datasets"),
    *("qwen-vl-utils", "av", "pillow", "flash-attn"),
)


def describe() -> str:
    """One fact a line. No path, user name or environment variable is in it.

    Example:
        >>> describe().splitlines()[0].split()[0]
        'vlcpt'
    """
    import torch

    facts = {"vlcpt": __version__, "python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["cuda"] = str(torch.version.cuda) if torch.cuda.is_available() else "no GPU in reach"
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        facts[f"gpu {number}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())
