"""Write docs/troubleshooting.md: each message of an error in the code, by theme, with what to do about it.

Run: python docs/make_troubleshooting.py

A message is found where the code makes an error: in the call of an error's class, or of a function
that returns one, and where a rule of the configuration yields a text. What a run fills in stands as "…".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs/troubleshooting.md"


@dataclass(frozen=True)
class Theme:
    """A section of the page.

    Args:
        title: Its heading.
        modules: Beginnings of the modules' paths inside ``vlcpt/``; the longest that fits decides.
        about: Where such messages come from, and what to do where a message itself does not say it.
    """

    title: str
    modules: tuple[str, ...]
    about: str


THEMES = (
    Theme(
        "The configuration",
        ("config/", "errors", "cli", "run_files"),
        "Exit code 2, before data or weights are read. Change the key that the message names, in the "
        "file or behind "
        "the command. [configuration.md](configuration.md) lists every key, and "
        "[coming-from.md](coming-from.md) "
        "what other tools call it.",
    ),
    Theme(
        "Marks in the text",
        ("data/markup", "data/documents"),
        "Each message begins with file and line, and with the character where the mark stands. "
        "Correct the row; "
        "[training.md](training.md#rows-and-tags) describes the marks.",
    ),
    Theme(
        "Rows and their formats",
        ("data/formats/", "data/sources", "data/rows/fields"),
        "Correct the row that the message names, or say how the source is to be read (`format`, "
        "`targets`, "
        "`ignore_fields`): [data.md](data.md). `on_bad_data: skip` counts such rows and goes on.",
    ),
    Theme(
        "Files of rows",
        ("data/rows/",),
        "Correct the file or the path that the message names. [data.md](data.md#where-rows-may-be) "
        "says what is read.",
    ),
    Theme(
        "Images and videos",
        ("data/media/", "data/encode/vision", "data/encode/features", "model/vision_cache"),
        "The message names row and file. Write the file again, remove the row, or let `on_bad_data: "
        "skip` count it; "
        "`vlcpt check --decode` finds all of them before training.",
    ),
    Theme(
        "Documents, targets and planning",
        ("data/",),
        "Correct the rows that the message names; `dropped.jsonl` lists all of them. `vlcpt check` "
        "shows the same "
        "without starting a run.",
    ),
    Theme(
        "Prepared data",
        ("data/prepared/",),
        "Run the same `vlcpt prepare` again: [scale.md](scale.md#preparing-the-data-once).",
    ),
    Theme(
        "Workers",
        ("data/workers",),
        "[checkpoints.md](checkpoints.md#workers-that-die-or-hang) says what killed a worker. Start "
        "the run again with "
        "`--resume_from_checkpoint auto`.",
    ),
    Theme(
        "Base, weights and adapters",
        ("model/",),
        "Get the file again, or give another base, adapter or checkpoint.",
    ),
    Theme(
        "Merging", ("model/merge",), "Nothing was written. [hub.md](hub.md#merging) says what is compared."
    ),
    Theme(
        "Checkpoints and resuming",
        ("training/checkpoints/",),
        "A fragment such as “its saving was interrupted” is the reason why one checkpoint is skipped; "
        "the message "
        "goes on with the next one. Use another checkpoint, or its copy: "
        "[checkpoints.md](checkpoints.md).",
    ),
    Theme(
        "Training, on one GPU or several",
        ("training/",),
        "[gpu.md](gpu.md) and [scale.md](scale.md#several-gpus) describe what a run needs.",
    ),
    Theme(
        "Commands, folders and disks",
        ("runs/", "file_writes", "folder_locks", "interrupts", "report/", "demo/", ""),
        "Nothing incomplete is left behind. Correct what the message names and give the same command again.",
    ),
    Theme(
        "vlcpt doctor",
        ("runs/doctor/",),
        "[doctor.md](doctor.md) describes each line, and which key avoids what is not right.",
    ),
    Theme("The Hub", ("hub/",), "Nothing was sent. [hub.md](hub.md#pushing) describes what goes where."),
)

HEADER = """# Troubleshooting

A message says where, what was found and what to do. Find yours with the browser's search: take a few words of it that are
no name or number of your own. `…` stands for what depends on your files.

| what you see | what it is | what to do |
|---|---|---|
| a message and exit code 2 | the command or the configuration is wrong; nothing was read or written | the message names the key |
| a message and exit code 1 | the data or the run failed | the message names the row, the file or the process |
| a Python traceback | a bug, of ours or of a library | open an issue with it, and with what `vlcpt env` prints |
| `CUDA out of memory` | a pack's activations do not fit | [gpu.md](gpu.md#memory), the cheapest change first |
| the loss falls, and `blank_images_loss` falls with it | the text does not need its images | [evaluation.md](evaluation.md), [replay.md](replay.md#does-it-learn-from-the-images) |
| the loss of the retention set rises | the model forgets | [replay.md](replay.md#if-it-forgets) |
| `wait` above 2% in the log line | the GPU waits for data | [gpu.md](gpu.md#is-the-gpu-busy) |
| the loss is much above that of the base at step 1 | targets that nobody would write: broken OCR, markup, the wrong `format` | `vlcpt inspect my.yaml --rows 0:20` |
| several ranks, and one stands still | it waits for another one | the message after `ddp_timeout` names the rank that is behind |

The tables are what `python docs/make_troubleshooting.py` finds in the code: {count} messages. A table's second column says
what to do as the message itself ends. Messages that end without that are listed below the table: do what stands above it.
"""  # noqa: E501

# A sentence ends with a full stop; or with what is filled in, where a word follows that asks for something.
_ASKS = "Check|Correct|Delete|Encode|Fill|Get|Give|Look|Mend|Put|Remove|Set|Try|Use|Write"
_SENTENCE = re.compile(rf"(?<=[^.\s][.!?])\s+(?=[A-Z`])|(?<=…)\s+(?=(?:{_ASKS})\b)")
_YIELDS = ("rules", "wrong", "missing", "refuse", "unused", "differ")


@dataclass(frozen=True)
class Message:
    """A message as the code has it: its module, and its text with "…" for what is not known yet."""

    module: str
    text: str

    def parts(self) -> tuple[str, str]:
        """What it says, and what to do: its last sentences, from the first that asks for something."""
        sentences = _SENTENCE.split(self.text)
        return sentences[0], " ".join(sentences[1:])


class Texts(ast.NodeVisitor):
    """Collects the messages of one module."""

    def __init__(self, module: str, tree: ast.Module, makers: set[str]) -> None:
        self.module = module
        self.makers = makers
        self.found: list[Message] = []
        self.names = [constants(tree.body)]
        self.function = ""
        self.visit(tree)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.function = self.function, node.name
        self.names.append(constants([one for one in ast.walk(node) if isinstance(one, ast.stmt)]))
        self.generic_visit(node)
        self.names.pop()
        self.function = outer

    def visit_Call(self, node: ast.Call) -> None:
        if called(node.func) in self.makers:
            for argument in node.args:
                self.take(argument)
        self.generic_visit(node)

    def visit_Yield(self, node: ast.Yield) -> None:
        if node.value is not None and any(word in self.function for word in _YIELDS):
            self.take(node.value)
        self.generic_visit(node)

    def take(self, node: ast.expr) -> None:
        """Keep the text of an expression if it is one that a person can read."""
        text = " ".join(self.text(node).split())
        words = re.findall(r"[A-Za-z]{2,}", text)
        if len(words) >= 4 and self.has_words(node):
            self.found.append(Message(self.module, text))

    def has_words(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp | ast.IfExp | ast.Name)

    def text(self, node: ast.expr) -> str:
        """An expression as text, with "…" for what is not known before the program runs."""
        match node:
            case ast.Constant(value=str(value)):
                return value
            case ast.JoinedStr(values=values):
                return "".join(map(self.text, values))
            case ast.FormattedValue(value=ast.expr() as value):
                return self.text(value)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self.text(left) + self.text(right)
            case ast.IfExp(body=body, orelse=orelse):
                return self.text(body) or self.text(orelse)
            case ast.Name(id=name):
                for names in reversed(self.names):
                    if name in names:
                        value = names[name]
                        outer, self.names = self.names, [one for one in self.names if one is not names]
                        found = self.text(value)
                        self.names = outer
                        return found
        return "…"


def constants(body: list[ast.stmt]) -> dict[str, ast.expr]:
    """Names that are given a text, and only one."""
    found: dict[str, list[ast.expr]] = {}
    for one in body:
        if isinstance(one, ast.Assign) and len(one.targets) == 1 and isinstance(one.targets[0], ast.Name):
            found.setdefault(one.targets[0].id, []).append(one.value)
    texts = (ast.Constant, ast.JoinedStr, ast.BinOp)
    return {
        name: values[0] for name, values in found.items() if len(values) == 1 and isinstance(values[0], texts)
    }


def called(function: ast.expr) -> str:
    """The last name of what is called."""
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def makers(trees: dict[str, ast.Module]) -> set[str]:
    """What makes an error: the package's error classes, and functions that return one of them."""
    names = {"ValueError", "RuntimeError", "OSError"}
    for tree in trees.values():
        names |= {
            one.name for one in ast.walk(tree) if isinstance(one, ast.ClassDef) and one.name.endswith("Error")
        }
    functions = {"refuse"}
    for tree in trees.values():
        for one in ast.walk(tree):
            if (
                isinstance(one, ast.FunctionDef)
                and one.returns is not None
                and ast.unparse(one.returns) in names
            ):
                functions.add(one.name)
    # A place given to an error, or sent to the other ranks, is no message.
    return (names | functions) - {"at", "error"}


@cache
def messages() -> list[Message]:
    """Every message of the package, once, in the order of the files."""
    paths = sorted(path for path in (ROOT / "vlcpt").rglob("*.py") if not path.name.startswith("build"))
    trees = {str(path.relative_to(ROOT / "vlcpt")): ast.parse(path.read_text("utf-8")) for path in paths}
    names = makers(trees)
    found = [message for module, tree in trees.items() for message in Texts(module, tree, names).found]
    # Nobody can search for one that begins with what is filled in and ends there.
    return list({one.text: one for one in found if len(re.findall("[A-Za-z]", one.parts()[0])) >= 3}.values())


def theme_of(message: Message) -> Theme:
    """The section in which a message stands."""
    fits = [
        (len(start), theme) for theme in THEMES for start in theme.modules if message.module.startswith(start)
    ]
    return max(fits, key=lambda fit: fit[0])[1]


def cell(text: str) -> str:
    """A text inside a table: no character of it is markup."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def lines() -> Iterator[str]:
    """The page."""
    found = messages()
    yield HEADER.format(count=len(found))
    for theme in THEMES:
        rows = [message.parts() for message in found if theme_of(message) is theme]
        cured = [f"| {cell(says)} | {cell(todo)} |" for says, todo in rows if todo]
        others = [f"- {cell(says)}" for says, todo in rows if not todo]
        if rows:
            yield f"## {theme.title}\n\n{theme.about}\n"
        if cured:
            yield "\n".join(["| message | what to do |", "|---|---|", *cured, ""])
        if others:
            yield "\n".join(["Do what stands above where you see:", "", *others, ""])


def page() -> str:
    return "\n".join(lines()).rstrip() + "\n"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
