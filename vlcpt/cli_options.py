"""What the commands' options have in common: how they are written, completed and shown by example."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from typer.core import CompletionItem, TyperCommand


def with_dashes(name: str) -> str:
    """As each option is known: it may be written with underscores or dashes."""
    return name.replace("_", "-")


class Configured(TyperCommand):
    """A command with a configuration, any key of which can follow as --key value."""

    def shell_complete(self, ctx: typer.Context, incomplete: str) -> list[CompletionItem]:  # type: ignore[override]
        """The command's options, then the keys, from a file: nothing heavy is imported."""
        found: list[CompletionItem] = super().shell_complete(ctx, incomplete)
        if not incomplete.startswith("--"):
            return found
        from vlcpt.config.keys import known_types

        asked = incomplete[2:].replace("-", "_")
        return [*found, *(CompletionItem(f"--{key}") for key in known_types() if key.startswith(asked))]


def examples(*lines: str) -> str:
    """The end of a command's help: lines as typed, which are not wrapped."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def _log_warnings_alone(is_quiet: bool) -> bool:
    if is_quiet:
        logging.getLogger("vlcpt").setLevel(logging.WARNING)
    return is_quiet


# What follows the options of a command is --key value for the configuration.
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        callback=_log_warnings_alone,
        is_eager=True,
        help="Show errors, warnings and the result's last line only.",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as JSON on stdout, and all else on stderr."),
]
