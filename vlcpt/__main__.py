"""``vlcpt``, ``python -m vlcpt``, ``torchrun -m vlcpt`` and ``deepspeed --module vlcpt``."""

import atexit
import codecs
import io
import os
import sys
import threading

# What a terminal without our own marks is sent for them; any other character that it lacks is a "?".
_PLAIN = {
    "«": "<<",
    "»": ">>",
    "┊": "|",
    "✂": "8<",
    "×": "x",
    "–": "-",
    "…": "...",
    "÷": "/",
    "−": "-",
    "•": "*",
    "→": "->",
    "’": "'",
}

_HOOKS = 5.0  # seconds that the hooks of a process that ends early may take


def print_everywhere() -> None:
    """Let stdout and stderr replace what their encoding lacks: `LC_ALL=C` and Windows' code pages have no
    Chinese, and a run must not end at a character of its data."""

    def replaced(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        lacking = error.object[error.start : error.end]
        return "".join(_PLAIN.get(one, "?") for one in lacking), error.end

    codecs.register_error("vlcpt", replaced)
    for stream in (sys.stdout, sys.stderr):
        # UTF-8 lacks halves of characters, which names of files may hold.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="vlcpt")


def main() -> None:
    """Run the command line."""
    print_everywhere()
    # `deepspeed --module` puts --local_rank before the command; every launcher sets LOCAL_RANK as well.
    arguments = iter(sys.argv[1:])
    kept: list[str] = []
    for argument in arguments:
        if argument in ("--local_rank", "--local-rank"):
            next(arguments, None)
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    sys.argv[1:] = kept
    try:
        from vlcpt.cli import app

        app()
    except KeyboardInterrupt:  # while that was imported
        sys.exit(130)
    except SystemExit as ended:
        _leave(ended.code)
        raise


def _leave(code: object) -> None:
    """End here and now where Python's own end may hang or abort: after a signal, and on every rank.

    Loaders wait for workers that are killed already, and other ranks may keep a process waiting. Threads of
    gloo, in torch 2.14, can abort a process at its end, and also where it leaves the group: a launcher then
    takes the run for failed, and ends the rank that is still at work.
    """
    torch = sys.modules.get("torch")
    is_rank = torch is not None and torch.distributed.is_initialized()
    if isinstance(code, int | None) and (is_rank or code in (130, 143)):
        if not code:
            threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python's own end does
        # Trackers send what is left from there; after a failure one of these hooks may be what hangs.
        hooks = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
        hooks.start()
        hooks.join(_HOOKS if code else None)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


if __name__ == "__main__":
    main()
