"""What a file of weights holds, from its header alone: names and shapes, and whether it is whole."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

Shapes = Mapping[str, tuple[int, ...]]

# A configuration of a model or an adapter has a few kilobytes; reading JSON takes ten times its size.
MAX_JSON_BYTES = 16 * 2**20
# What a file that is not what its name says can make torch or transformers raise.
UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, RuntimeError),
    *(ArithmeticError, AssertionError, MemoryError, RecursionError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, StrictDataclassError),
)


def read_json(path: Path) -> dict[str, object]:
    """A file that holds one JSON object.

    Raises:
        ValueError: With the file, what is wrong with it, and what to do.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "config.json")
        >>> _ = path.write_text('["r"]')
        >>> read_json(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: .../config.json: expected a JSON object, found a list. Get the file again, or use ...
    """
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise damaged(path, f"it has {size:,} bytes, more than any such file")
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise damaged(path, f"it cannot be read: {error.strerror}") from error
    except RecursionError:
        raise damaged(path, "it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise damaged(path, "it is no text in UTF-8") from error
    except json.JSONDecodeError as error:
        raise damaged(path, f"line {error.lineno} is no JSON: {error.msg}") from error
    if not isinstance(found, dict):
        kind = "a list" if isinstance(found, list) else "a value"
        raise damaged(path, f"expected a JSON object, found {kind}")
    return found


def read_shapes(path: Path) -> Shapes:
    """The shape of each tensor in a file of weights; no tensor is read.

    Args:
        path: Of safetensors, or of an archive that ``torch.save`` wrote, of which only tensors are taken.

    Raises:
        ValueError: With the file, if it is cut, damaged, or holds more than tensors.

    Example:
        >>> from importlib.resources import files
        >>> shapes = read_shapes(Path(str(files("vlcpt") / "demo/base/model.safetensors")))
        >>> shapes["visual.merger.ln_q.weight"]
        (96,)
    """
    if path.suffix != ".safetensors":
        held = read_archive(path)
        tensors = held.items() if isinstance(held, dict) else ()
        return {str(name): tuple(one.shape) for name, one in tensors if isinstance(one, torch.Tensor)}
    try:
        # For torch it would map the whole file to write in, which a machine with less memory refuses.
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise damaged(path, f"it is no whole safetensors file ({_one_line(error)})") from error


def read_archive(path: Path) -> object:
    """What ``torch.save`` put into a file: tensors stay on disk until they are used, and no code is run.

    torch's own messages about a file that it does not take say how to run the code in it, so none of them
    gets out. Members that are compressed could fill memory, and ``torch.save`` writes none.

    Raises:
        ValueError: With the file and what is wrong with it.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "scheduler.pt")
        >>> torch.save({"last_epoch": 2}, path)
        >>> read_archive(path)
        {'last_epoch': 2}
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if any(
            one.compress_type != zipfile.ZIP_STORED or one.file_size != one.compress_size for one in members
        ):
            raise damaged(path, "it is compressed, which torch.save never does")
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError as error:
        raise damaged(path, "there is no such file") from error
    except pickle.UnpicklingError as error:
        raise damaged(
            path,
            "it is a pickle that holds more than tensors, or a damaged one. Loading it could run code, so it "
            "is not loaded",
        ) from error
    except UNREADABLE as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise damaged(path, "it is cut, or no file that torch.save writes") from error


def damaged(path: Path | str, found: str) -> ValueError:
    """The error for a saved file that cannot be used.

    Example:
        >>> str(damaged("out/optimizer.pt", "it is cut"))
        'out/optimizer.pt: it is cut. Get the file again, or use another checkpoint.'
    """
    return ValueError(f"{path}: {found}. Get the file again, or use another checkpoint.")


def numbers_in(shapes: Shapes) -> int:
    """How many numbers tensors of these shapes hold.

    Example:
        >>> numbers_in({"a": (2, 3), "b": ()})
        7
    """
    return sum(math.prod(shape) for shape in shapes.values())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(". ")
