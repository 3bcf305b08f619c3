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
    """One fact a line.

    Example:
        >>> describe().splitlines()[0].split()[0]
        'vlcpt'
    """
    found = facts()
    width = max(map(len, found))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in found.items())


def facts() -> dict[str, str]:
    """Versions and devices by name. No path, user name or environment variable is in it.

    Example:
        >>> list(facts())[:2]
        ['vlcpt', 'python']
    """
    import torch

    found = {"vlcpt": __version__, "python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["cuda"] = str(torch.version.cuda) if torch.cuda.is_available() else "no GPU in reach"
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found[f"gpu {number}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return found
