"""The commands: the one place that prints. Heavy imports wait until a command needs them."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from typer.core import TyperGroup

from vlcpt import __version__
from vlcpt.cli_options import OVERRIDES, Config, Configured, Json, Quiet, examples, with_dashes
from vlcpt.interrupts import answered, interrupt, none_left

if TYPE_CHECKING:
    from vlcpt.config.yaml import Configs
    from vlcpt.report.screen import Screen

logger = logging.getLogger(__name__)


class _Commands(TyperGroup):
    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]  # typer hides its base
        """Run a command. Errors that a user can fix become one message and an exit code."""
        with _reported():
            return super().invoke(ctx)


app = typer.Typer(
    name="vlcpt",
    cls=_Commands,
    context_settings={"token_normalize_func": with_dashes},
    help="Continued pre-training of Qwen2.5-VL on interleaved documents of images, video and text.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"vlcpt {__version__}")
        raise typer.Exit


@app.command(epilog=examples("vlcpt demo", "vlcpt demo --output_dir /tmp/demo --overwrite"))
def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("vlcpt-demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo there.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole job on an embedded model and data. Minutes on a CPU."""
    from vlcpt.folder_locks import require_free

    require_free(output_dir)
    _say_loading(f"the demo goes to {output_dir}")
    from vlcpt.demo.run import run_demo

    run_demo(output_dir, overwrite=overwrite, console=_screen(quiet))


@app.command(
    cls=Configured,
    context_settings=OVERRIDES,
    epilog=examples(
        "vlcpt train my.yaml",
        "vlcpt train my.yaml --learning_rate 5e-5 --output_dir runs/slower",
        "vlcpt train my.yaml --resume_from_checkpoint auto",
        "torchrun --nproc_per_node 8 -m vlcpt train my.yaml --deepspeed zero2",
    ),
)
def train(context: typer.Context, config: Config, quiet: Quiet = False) -> None:
    """Train. Any key of the configuration can follow as --key value."""
    configs = _read(context, config)
    from vlcpt.runs.page import typed
    from vlcpt.runs.train import train_run

    words = ["vlcpt", "train", str(config), *context.args]
    train_run(
        configs, _screen(quiet), config_path=config, command=typed(words), is_overridden=bool(context.args)
    )


@app.command(
    cls=Configured,
    context_settings=OVERRIDES,
    epilog=examples(
        "vlcpt check my.yaml",
        "vlcpt check my.yaml --decode --num_processes 8 --gpu H100",
        "vlcpt check my.yaml --json > found.json",
    ),
)
def check(
    context: typer.Context,
    config: Config,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image and video as well.")] = False,
    num_processes: Annotated[int | None, typer.Option(help="GPUs that will share the work.", min=1)] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Also say how long an epoch takes on this GPU: a name (H100), or its doctor.json."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what would become of every document, and what to change. Loads no weights; exits with 1 if any
    document would be lost."""
    configs = _read(context, config)
    with _apart(as_json):
        from vlcpt.runs.check import check_run

        found = check_run(
            configs, decode=decode, num_processes=num_processes, gpu=gpu, console=_screen(quiet)
        )
    if as_json:
        _print_json(found.as_json())
    if not found.is_complete:
        raise typer.Exit(1)


@app.command(
    name="eval",
    cls=Configured,
    context_settings=OVERRIDES,
    epilog=examples(
        "vlcpt eval my.yaml --checkpoint runs/manuals --output eval.json",
        "vlcpt eval my.yaml --checkpoint runs/manuals/checkpoint-200 --json",
        "vlcpt eval my.yaml --checkpoint runs/manuals --samples 3",
    ),
)
def evaluate(
    context: typer.Context,
    config: Config,
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint, final model or adapter to measure.")],
    output: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file.")] = None,
    samples: Annotated[
        int, typer.Option(help="Continue this many documents of each held-out set, beside the truth.", min=0)
    ] = 0,
    per_document: Annotated[
        Path | None, typer.Option(help="Write a JSON line for each document, the worst first.")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write what its image gives each target: a page (.html) or a line a document (.jsonl).",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what was learnt, whether by the images, and what was kept. From losses of held-out and
    retention data against its base, with 95% intervals."""
    from vlcpt.run_files import require_paths

    require_paths(checkpoint, output, per_document, tokens)
    configs = _read(context, config)
    with _apart(as_json):
        from vlcpt.report.verdict import CommandPaths
        from vlcpt.runs.evaluate import eval_run
        from vlcpt.runs.page import typed

        paths = CommandPaths(typed([str(config), *context.args]), typed([str(checkpoint)]))
        console = _screen(quiet)
        found = eval_run(
            *(configs, checkpoint, output, console),
            samples=samples,
            per_document=per_document,
            tokens=tokens,
            paths=paths,
        )
    if as_json and os.environ.get("RANK", "0") == "0":
        _print_json(found.as_json())


@app.command(
    cls=Configured,
    context_settings=OVERRIDES,
    epilog=examples(
        "vlcpt inspect my.yaml",
        "vlcpt inspect my.yaml --rows 100:120",
        "vlcpt inspect my.yaml --html rows.html",
        "vlcpt inspect my.yaml --reliance runs/manuals --html rows.html",
    ),
)
def inspect(
    context: typer.Context,
    config: Config,
    rows: Annotated[
        str | None,
        typer.Option(help="Documents of each source, e.g. 0:20 or 7. Default: 0:5; of a page 0:100."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with all pictures to this file.")
    ] = None,
    packs: Annotated[
        bool | None,
        typer.Option(
            "--packs/--no-packs",
            help="Whether the page has packs, for which all rows are read. Default: up to 5,000 rows.",
        ),
    ] = None,
    reliance: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="Colour targets by what their image gives them there."),
    ] = None,
) -> None:
    """Show exactly which tokens are trained. Loads no weights but for --reliance; decodes pixels only for
    that and for a page."""
    from vlcpt.run_files import require_checkpoint, require_file

    numbers = None if rows is None else _slice(rows)
    require_file("--html", html)
    require_checkpoint("--reliance", reliance)
    configs = _read(context, config, computes=reliance is not None)
    from vlcpt.runs.inspect import inspect_run

    inspect_run(configs, numbers, html=html, packs=packs, reliance=reliance)


@app.command(
    cls=Configured,
    context_settings=OVERRIDES,
    epilog=examples(
        "vlcpt prepare my.yaml --output prepared",
        "vlcpt prepare my.yaml --vision_cache features",
    ),
)
def prepare(
    context: typer.Context,
    config: Config,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the shards. Without it only vision_cache is filled.")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="This machine's processes, or a Ray cluster.")
    ] = "local",
    quiet: Quiet = False,
) -> None:
    """Encode the data once, into shards that train reads. With vision_cache compute what a frozen vision
    tower gives. Run it again to continue after an interruption."""
    from vlcpt.folder_locks import require_free

    if output is not None:
        require_free(output, "--output")
    configs = _read(context, config)
    from vlcpt.runs.prepare import prepare_run

    prepare_run(configs, output, engine, _screen(quiet))


@app.command(
    epilog=examples(
        "vlcpt report runs/manuals",
        "vlcpt report runs/manuals runs/slower --output compared.html",
    )
)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs (output_dir).")],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Default: report.html in the run's folder; of several, in this one."
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="What `vlcpt eval --output` wrote about the one run. Default: its eval.json."),
    ] = None,
) -> None:
    """Make a run's page again, or one that compares runs. Reads files and loads no model."""
    from vlcpt.report.screen import visible
    from vlcpt.runs.report import report_run

    print(visible(f"written to {report_run(runs, output, evaluation)}"))


@app.command(
    epilog=examples(
        "vlcpt merge runs/manuals merged",
        "vlcpt merge runs/manuals/checkpoint-200 merged --dtype bfloat16",
    )
)
def merge(
    checkpoint: Annotated[Path, typer.Argument(help="Run's folder or checkpoint: an adapter or a model.")],
    output: Annotated[Path, typer.Argument(help="Folder to write the merged model to.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: that of the base.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Size of a file of weights, at most.")] = "50GB",
    quiet: Quiet = False,
) -> None:
    """Write a run's result as one plain model. On the CPU, in its base's type; only if the logits match."""
    from vlcpt.folder_locks import require_free, require_new, staging_folder
    from vlcpt.model.saved import check_checkpoint

    require_free(staging_folder(output), "output", shown=output)
    require_new(output)
    check_checkpoint(str(checkpoint))
    _say_loading(f"{checkpoint} will be merged into {output}")
    from vlcpt.model.merge import merge_adapter
    from vlcpt.report.screen import visible
    from vlcpt.runs.data import quiet_libraries

    quiet_libraries()
    merge_adapter(checkpoint, output, dtype=dtype, max_shard_size=max_shard_size)
    print(visible(f"merged into {output}"))


@app.command(
    epilog=examples(
        "vlcpt push runs/manuals me/manuals --dry-run",
        "vlcpt push merged me/manuals --run runs/manuals --license apache-2.0",
    )
)
def push(
    checkpoint: Annotated[Path, typer.Argument(help="Run's folder or checkpoint: an adapter or a model.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Repository on the Hub: owner/name.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be sent; send nothing.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="For all to see. Default: private.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Hub id of a base that was a folder.")] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Run that the card describes; for a merged model its adapter's."),
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence of what is pushed, e.g. apache-2.0.")] = None,
    license_link: Annotated[str | None, typer.Option(help="Its text, if the Hub does not know it.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="What `vlcpt eval --output` wrote, for the card.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to. Default: main.")] = None,
) -> None:
    """Send an adapter or a model to the Hub, with its card. Private by default; the token is that of
    `hf auth login` or HF_TOKEN."""
    from vlcpt.hub.access import check_folders, check_names, push_command, require_hub

    check_names(repo_id, base_model, revision)
    check_folders(checkpoint, run, evaluation)
    if not dry_run:
        named = {"base_model": base_model, "run": run, "license": license, "license_link": license_link}
        named |= {"evaluation": evaluation, "revision": revision}
        again = push_command(checkpoint, repo_id, private=not public, **named)
        require_hub(repo_id, then=f"Check the network. Try again: {again}")
    _say_loading(f"reading {checkpoint}")
    from rich.text import Text

    from vlcpt.hub.push import push_adapter
    from vlcpt.report.card import Licence
    from vlcpt.report.screen import Screen
    from vlcpt.report.terminal import push_lines

    done = push_adapter(
        checkpoint,
        repo_id,
        private=not public,
        dry_run=dry_run,
        base_model=base_model,
        run=run,
        licence=Licence(license, license_link),
        evaluation=evaluation,
        revision=revision,
    )
    if done.url:
        print(f"pushed to {done.url} ({'private' if done.private else 'public'})")
        return
    screen = Screen()
    for line in push_lines(done):
        # The card's lines are not wrapped, for a person to copy.
        screen.print(line, highlight=False, soft_wrap=isinstance(line, Text))


@app.command(
    cls=Configured,
    context_settings=OVERRIDES,
    epilog=examples(
        "vlcpt doctor --quick",
        "vlcpt doctor my.yaml --output h100.json",
        "torchrun --nproc_per_node 8 -m vlcpt doctor my.yaml --deepspeed zero3",
    ),
)
def doctor(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="The run's YAML file. Default: the embedded demo's."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes on two cores.")] = False,
    output: Annotated[Path, typer.Option(help="Write what was found to this JSON file.")] = Path(
        "doctor.json"
    ),
    quiet: Quiet = False,
) -> None:
    """Prove that training is right on this machine. With the run's kernels, type, batch size and ranks;
    measures what it reaches, too. Exits with 1 if something is not right."""
    if config is not None and config.startswith("--"):  # no CONFIG, but --key value
        context.args.insert(0, config)
        config = None
    path = Path(config) if config is not None else Path(__file__).with_name("demo") / "doctor.yaml"
    from vlcpt.config.yaml import complete, read_early

    early = read_early(path, context.args)
    _say_loading(f"{path} is read" if config is not None else "no CONFIG: the embedded demo is examined")
    configs = complete(early)
    from vlcpt.runs.doctor.run import doctor_run

    console, is_given = _screen(quiet), config is not None
    if not doctor_run(early, configs, output, quick=quick, is_given=is_given, console=console).passed:
        raise typer.Exit(1)


@app.command(epilog=examples("vlcpt env"))
def env() -> None:
    """Versions and devices, for a bug report."""
    _say_loading("reading versions and devices")
    from vlcpt.report.environment import describe

    print(describe())


def _screen(is_quiet: bool) -> Screen:
    """Where a command shows its tables and lines."""
    from vlcpt.report.screen import Screen

    return Screen(brief=is_quiet)


@contextmanager
def _apart(as_json: bool) -> Iterator[None]:
    """Keep stdout for the JSON alone: what is printed meanwhile, libraries included, goes to stderr."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield


def _print_json(found: Mapping[str, object]) -> None:
    from vlcpt.file_writes import json_text

    # ASCII alone, for stdout of any encoding, and for ids that hold control characters.
    print(json_text(found, ensure_ascii=True), end="")


def _read(context: typer.Context, config: Path, *, computes: bool = False) -> Configs:
    """The configuration of a command. Most mistakes are reported within a second, the others before its work
    is imported. What train refuses about output_dir, check only reports.

    Args:
        computes: Whether the command runs the model, also where its name does not say so.
    """
    from vlcpt.config.rules import missing_packages
    from vlcpt.config.yaml import complete, read_early
    from vlcpt.errors import ConfigError, refuse
    from vlcpt.folder_locks import require_free
    from vlcpt.run_files import require_empty

    command, early = context.info_name, read_early(config, context.args)
    if command == "train":
        refuse(early.located(missing_packages({**vars(early.model), **early.training})))
    # Where one launcher started all ranks, it ends the others; else rank 0 reports it to all of them later.
    rank, ranks, here = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if command in ("train", "check") and rank in (None, "0") and ranks == here:
        try:
            require_free(early.output)
            require_empty(early.output, config, early.training)
        except ConfigError as error:
            if command == "train":
                raise
            logger.warning("vlcpt train would refuse this: %s", error)
    _say_loading(f"{config} is read")
    fills = command == "prepare" and early.training.get("vision_cache") is not None
    return complete(early, computes=computes or command in ("train", "eval") or fills)


def _say_loading(done: str) -> None:
    """Say why nothing happens for some seconds."""
    logger.info("%s; loading torch and transformers …", done)


def _slice(rows: str) -> slice:
    first, colon, last = rows.partition(":")
    try:
        start = int(first or 0)
        stop = int(last) if last else None if colon else start + 1
        if start < 0 or (stop is not None and stop <= start):
            raise ValueError
    except ValueError:
        _fail(f"--rows {rows}: expected a number, or first:last with first below last, e.g. 0:20.", 2)
    return slice(start, stop)


@contextmanager
def _reported() -> Iterator[None]:
    """Errors that a user can fix become one message and an exit code; all others keep their trace."""
    _quiet_libraries()
    from vlcpt.data.documents import DocumentError
    from vlcpt.errors import ConfigError
    from vlcpt.report.screen import shown_log

    # Which format was chosen, and why: once, not on every rank.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    try:
        with shown_log(level), answered("ending", interrupt), none_left():
            yield
    except KeyboardInterrupt:  # what was saved is reported already
        _fail("interrupted", 130)
    except SystemExit as ended:
        if ended.code == 143:
            _fail("interrupted", 143)
        raise
    except ConfigError as error:
        _fail(str(error), 2)
    except ValueError as error:
        if not isinstance(error, DocumentError) and not _is_ours(error):
            raise
        _fail(str(error), 1)
    except OSError as error:
        _fail(_disk_message(error), 1)


def _disk_message(error: OSError) -> str:
    """What the system says, with what is free where a library found a disk full or read-only."""
    from vlcpt.file_writes import WriteError, Writing

    named = error.filename2 or error.filename
    if isinstance(error, WriteError) or not isinstance(named, str):
        return str(error)
    return str(Writing(Path(named), reads=True).refused(error) or error)


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised by this package, which then says what to do."""
    raised = traceback.extract_tb(error.__traceback__)[-1]
    return str(Path(__file__).parent) in raised.filename


def _quiet_libraries() -> None:
    """Keep what libraries print while loading out of a person's way, unless they asked for it."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # upstream's own, about upstream's names
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _fail(message: str, code: int) -> NoReturn:
    from vlcpt.config.values import redacted
    from vlcpt.report.screen import visible

    sys.stdout.flush()
    # Not typer's echo, which sends UTF-8 to a terminal of ASCII.
    print(visible(redacted(f"vlcpt: {message}")), file=sys.stderr)
    raise typer.Exit(code)
