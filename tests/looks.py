"""Counts who asks for the values of tensors: on a GPU each waits for all that was queued before."""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vlcpt

PACKAGE = str(Path(vlcpt.__file__).parent)
LOOKS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Looks(TorchDispatchMode):
    """Where a tensor's values are asked for: the innermost line that is not torch's own, of any package."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()
        self.is_on = True
        self._thread = threading.get_ident()
        tolist = torch.Tensor.tolist

        def counted(tensor):  # passes by the dispatcher
            self.note()
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def note(self) -> None:
        # Threads that report what is read look at memory that processes share.
        if not self.is_on or threading.get_ident() != self._thread:
            return
        frame = sys._getframe(1)
        while (file := frame.f_code.co_filename) == __file__ or "/torch/" in file:
            frame = frame.f_back
        self.lines[f"{file}:{frame.f_lineno}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in LOOKS:
            self.note()
        return func(*args, **(kwargs or {}))

    @property
    def ours(self) -> dict[str, int]:
        return {line: count for line, count in self.lines.items() if line.startswith(PACKAGE)}

    @contextmanager
    def off(self) -> Iterator[None]:
        """Where what is looked at is on the CPU in every run."""
        before, self.is_on = self.is_on, False
        try:
            yield
        finally:
            self.is_on = before

    def leave_out(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        """Count nothing in a function."""
        function: Callable[..., object] = getattr(owner, name)

        def uncounted(*args, **kwargs):
            with self.off():
                return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, uncounted)
