"""What a run shows in a terminal: tables, and documents with their targets marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from vlcpt.data.documents import Image
from vlcpt.data.encode.encoder import TokenStream
from vlcpt.data.encode.pieces import NEEDS_IMAGE
from vlcpt.data.plan.ledger import Ledger
from vlcpt.data.plan.split import Part
from vlcpt.report.numbers import number
from vlcpt.report.screen import Sheet, plain_table, shows_colour, visible

if TYPE_CHECKING:
    from vlcpt.hub.push import Push
    from vlcpt.model.tuning import TowerRow
    from vlcpt.training.continuations import Continuation
    from vlcpt.training.scores import SetResult

# Two shades, so that neighbouring tokens can be distinguished.
_TARGET = ("black on green3", "black on dark_sea_green2")
_CONTEXT = ("", "dim")
# What its image gives a target: nats below which, its style, and what the legend calls it. From weak to
# strong also without a sense of colour.
_NATS = (
    (-0.05, "black on plum2", "below -0.05"),
    (0.05, "underline", "none"),
    (0.25, "black on light_goldenrod2", "to 0.25"),
    (1.0, "black on gold1", "to 1"),
    (2.5, "black on dark_orange", "to 2.5"),
    (float("inf"), "bold white on red3", "more"),
)


def ledger_table(ledger: Ledger) -> Sheet:
    """What came in, what is used, what was dropped and why, what is trained.

    Example:
        >>> [label for label, _ in ledger_table(Ledger(["train"])).rows]
        ['documents read', '  used', '  targets']
    """
    return Sheet("ledger", *ledger.table())


def towers_table(rows: Sequence[TowerRow]) -> Table:
    """What trains, tower by tower."""
    table = plain_table("what trains")
    for name in ("tower", "how", "trained", "of", "held as"):
        table.add_column(name, justify="right" if name in ("trained", "of") else "left")
    for row in rows:
        table.add_row(row.tower, row.how, f"{row.trained:,}", f"{row.total:,}", row.dtype)
    return table


def results_table(results: Mapping[str, SetResult]) -> Sheet:
    """Evaluation, a column a set: perplexity, and how the loss changes without the adapter or the images.

    Where images were measured, also the share of targets that need theirs.
    """

    def shown(value: float | None, digits: int = 4) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    found = list(results.values())
    rows = [
        ("targets", [f"{one['targets']:,}" for one in found]),
        ("loss", [shown(one["loss"]) for one in found]),
        ("perplexity", [number(one["perplexity"]) for one in found]),
        ("bits/byte", [shown(one["bits_per_byte"], 3) for one in found]),
        ("base", [shown(one["base_loss"]) for one in found]),
        ("shuffled", [shown(one["shuffled_images_loss"]) for one in found]),
        ("blank", [shown(one["blank_images_loss"]) for one in found]),
    ]
    needs = [relying["share_over_0.1"] if (relying := one.get("reliance")) else None for one in found]
    if any(share is not None for share in needs):
        cells = ["–" if share is None else f"{share:.0%}" for share in needs]
        rows.append((f"targets over {NEEDS_IMAGE} nats", cells))
    if all("documents" in one for one in found):
        rows.insert(0, ("documents", [f"{one['documents']:,}" for one in found]))
    caption = "nats per target; base: before training; shuffled: another document's images"
    return Sheet("evaluation", [*results], rows, caption)


def continuation_lines(name: str, found: Sequence[Continuation]) -> list[Text]:
    """Documents of a set as the model continued them, beside what they say.

    Example:
        >>> one = {"document": "a", "source": "a.jsonl:1", "media": ["a.png"], "before": "[image]Fig. 1 ",
        ...        "continuation": "shows a pump", "truth": "shows the valve"}
        >>> [line.plain for line in continuation_lines("held", [one])][2:4]
        ['  model  shows a pump', '  truth  shows the valve']
    """
    lines = [] if not found else [Text(visible(f"{name}: continued from its first trained span"), "bold")]
    for one in found:
        where = [
            one["document"],
            *([one["source"]] if one["source"] != one["document"] else []),
            *one["media"],
        ]
        lines.append(Text.assemble((visible("  ".join(where)), "cyan"), "\n", visible(one["before"])))
        for label, style in (("continuation", "bold"), ("truth", "green")):
            shown = {"continuation": "model", "truth": "truth"}[label]
            # Without the part of a character that the limit cut.
            text = one[label].rstrip("\ufffd")  # type: ignore[literal-required]
            lines.append(Text.assemble((f"  {shown}  ", "dim"), (visible(text), style)))
        lines.append(Text())
    return lines


def one_line(results: Mapping[str, SetResult]) -> str:
    """Evaluation, in one line."""
    return "; ".join(
        f"{name}: loss {one['loss']:.4f}, perplexity {number(one['perplexity'])}"
        for name, one in results.items()
    )


def legend(console: Console) -> Text:
    """What the marks of :func:`document_lines` mean.

    Example:
        >>> legend(Console(color_system=None)).plain
        '«trained» context  ┊ the rest is dropped  ✂ next part  ×2 weight'
    """
    mark = "bold red"
    trained = ("trained", _TARGET[0]) if shows_colour(console) else "«trained»"
    cuts = (("┊", mark), " the rest is dropped  ", ("✂", mark), " next part  ")
    return Text.assemble(trained, " context  ", *cuts, ("×2", "magenta"), " weight")


def nats_legend(console: Console) -> Text:
    """What the colours of :func:`document_lines` mean where it has nats.

    Example:
        >>> nats_legend(Console(color_system=None)).plain
        'nats that its image gives a target: (+2.1) behind a word that gets over 0.1'
    """
    title = Text("nats that its image gives a target: ")
    if not shows_colour(console):
        return title.append(f"(+2.1) behind a word that gets over {NEEDS_IMAGE}")
    for _, style, label in _NATS:
        title.append(f" {label} ", style).append(" ")
    return title


def document_lines(
    name: str,
    stream: TokenStream,
    parts: Sequence[Part],
    tokenizer: PreTrainedTokenizerFast,
    console: Console,
    nats: np.ndarray | None = None,
) -> list[Text]:
    """A document with its targets coloured, or in «» where there is no colour, and media folded.

    Args:
        nats: float (T,): what each target's image gives it, to colour them by; NaN where nothing is measured.
    """
    nats = None if nats is None else np.nan_to_num(nats)
    is_target = stream.labels >= 0
    targets, length = int(is_target.sum()), len(stream)
    end = parts[-1].stop if parts else 0
    title = f"{name}  {length} tokens, {targets} targets"
    title += f", {len(parts)} parts" if len(parts) > 1 else ""
    body = Text()
    media = {placed.start: placed for placed in stream.media}
    place, word = 0, 0.0
    starts = {part.start + part.repeated for part in parts[1:]}
    while place < length:
        if place in starts or place in media or place == end:
            word = _close_word(body, word)
        if place in starts:
            body.append(" ✂ ", style="bold red")
        if place == end and place < length:
            body.append(" ┊ ", style="bold red")  # what follows is trimmed
        if place in media:
            placed = media[place]
            kind = "image" if isinstance(placed.medium, Image) else "video"
            grid = "×".join(map(str, reversed(placed.merged_grid[kind == "image" :])))
            body.append(visible(f"[{kind} {placed.medium}: {placed.tokens} tokens, {grid}]"), style="cyan")
            place = placed.stop
            continue
        stop = _readable(stream.input_ids, place, length, tokenizer)
        text = str(tokenizer.decode(stream.input_ids[place:stop], clean_up_tokenization_spaces=False))
        if nats is not None and is_target[place]:
            word = _append_nats(body, visible(text), float(nats[place:stop].sum()), console, word)
        else:
            word = _close_word(body, word)
            _append(body, visible(text), bool(is_target[place]), place, shows_colour(console))
        weight = float(stream.loss_weights[place])
        following = float(stream.loss_weights[stop]) if stop < length else 0.0
        if weight not in (0.0, 1.0) and following != weight:
            body.append(f"×{weight:g}", style="magenta")
        place = stop
    _close_word(body, word)
    return [Text(visible(title), style="bold"), body, Text()]


def _readable(ids: np.ndarray, start: int, length: int, tokenizer: PreTrainedTokenizerFast) -> int:
    """The end of the shortest run of tokens that cuts no character."""
    for stop in range(start + 1, min(start + 8, length) + 1):
        if "\ufffd" not in tokenizer.decode(ids[start:stop]):
            return stop
    return start + 1


def _append(body: Text, text: str, is_target: bool, place: int, colours: bool) -> None:
    if colours:
        body.append(text, style=(_TARGET if is_target else _CONTEXT)[place % 2])
        return
    if is_target and body.plain.endswith("»"):
        body.right_crop(1)
        body.append(f"{text}»")
    else:
        body.append(f"«{text}»" if is_target else text)


def _append_nats(body: Text, text: str, nats: float, console: Console, word: float) -> float:
    """A target by what its image gives it; without colours the sum so far of the word it stands in."""
    if shows_colour(console):
        body.append(text, style=next(style for limit, style, _ in _NATS if nats < limit))
        return 0.0
    before = body.plain.rstrip("»")[-1:]
    if not (before + text[:1]).isascii() or not (before.isalnum() and text[:1].isalnum()):
        word = _close_word(body, word)
    _append(body, text, True, 0, False)
    return word + nats


def _close_word(body: Text, word: float) -> float:
    """Write what its image gives a word behind it, where it is much; the next one begins with 0."""
    if word > NEEDS_IMAGE:
        body.append(f"(+{word:.1f})")
    return 0.0


def push_lines(push: Push) -> list[RenderableType]:
    """The repository, every file with its size, and the card in full.

    Example:
        >>> from vlcpt import push_adapter
        >>> from vlcpt.demo import base_path
        >>> str(push_lines(push_adapter(base_path(), "me/mine", dry_run=True))[0])
        'would go to me/mine (private, branch main)'
    """
    table = plain_table()
    table.show_footer = True
    total = sum(file.size for file in push.files)
    table.add_column("file", f"{len(push.files)} files", overflow="fold")
    table.add_column("bytes", f"{total:,}", justify="right", no_wrap=True)
    for file in push.files:
        table.add_row(file.name, f"{file.size:,}")
    where = f"{'private' if push.private else 'public'}, branch {push.revision or 'main'}"
    head = Text(f"would go to {push.repo_id} ({where})")
    return [head, table, Text("README.md", "bold"), Text(visible(push.card))]
