"""``vlcpt``, ``python -m vlcpt``, ``torchrun -m vlcpt`` and ``deepspeed --module vlcpt``."""

import sys


def main() -> None:
    """Run the command line."""
    # `deepspeed --module` puts --local_rank before the command; every launcher sets LOCAL_RANK as well.
    arguments = iter(sys.argv[1:])
    kept: list[str] = []
    for argument in arguments:
        if argument in ("--local_rank", "--local-rank"):
            next(arguments, None)
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    sys.argv[1:] = kept
    from vlcpt.cli import app

    app()


if __name__ == "__main__":
    main()
