"""Load: indexes, `vlcpt check`, the ledger and the fuzzers at full length.

    python benchmarks/load.py                # all cases, each in a fresh process
    python benchmarks/load.py index media    # some of them

Peaks are the kernel's (VmHWM) in the case's own process: *held* is the whole process at most, *more* what
came on top of what it held before. Files are made in a temporary folder (``TMPDIR``), 700 MB at most.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import load_fuzz
import load_ledger
from machine import memory

LINES = 1_000_000
CHECKED = 1_000_000
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for tests.mutations


def memory_of_all(process: int) -> int:
    """Bytes of a process and its children; what they share since a fork counts once."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        children = []
    return sum(memory("Pss_Anon", f"/proc/{one}/smaps_rollup") for one in (process, *children))


def index(folder: Path) -> dict[str, object]:
    """Open a JSONL file of 1M lines, 306 MB; then read some lines of it."""
    path = folder / "lines.jsonl"
    with path.open("wb") as file:
        for first in range(0, LINES, 10_000):
            numbers = range(first, first + 10_000)
            file.write(b"".join(b'{"text": "%s", "id": "%07d"}\n' % (b"x" * 276, n) for n in numbers))
    from vlcpt.data.rows.text_files import JsonRows

    start = begin()
    rows = JsonRows(path)
    found = finish(start)
    assert len(rows) == LINES
    for number in [0, LINES - 1, *random.Random(0).choices(range(LINES), k=1000)]:
        assert rows.row(number)["id"] == f"{number:07d}"
    return {"bytes": path.stat().st_size, **found}


def write_texts(path: Path, count: int, spans: int) -> None:
    """Text documents of 230 characters; one with a span from a word in the middle, or none."""
    words = ["pump", "valve", "seal", "oil", "pressure", "closes", "opens", "before", "the", "of", "a", "12"]
    rng = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            text = f"{number} {' '.join(rng.choices(words, k=60))}"[:230]
            if spans:
                edge = text.index(" ", 100) + 1
                text = f"{text[:edge]}<trainable_text>{text[edge:]}</trainable_text>"
            file.write(json.dumps({"text": text}) + "\n")


def planning(folder: Path) -> dict[str, object]:
    """CPU of what planning does with a text document of 230 characters: the least of 40 rounds over 512."""
    from vlcpt import load_processor
    from vlcpt.data.encode.encoder import DocumentEncoder
    from vlcpt.data.encode.vision import EncodingOptions
    from vlcpt.data.plan.scan import Reading, SourceScanner
    from vlcpt.data.rows.open import SourceConfig
    from vlcpt.data.sources import open_source

    processor = load_processor(str(ROOT / "vlcpt/demo/base"))
    encoder = DocumentEncoder(processor, EncodingOptions(media_check="container"))
    found: dict[str, object] = {}
    for spans in (0, 1):
        write_texts(folder / "texts.jsonl", 512, spans)
        source = open_source(SourceConfig(str(folder / "texts.jsonl")))
        scanner = SourceScanner(source, encoder, Reading(2048, on_bad_data="skip"))
        documents = [source.document(row) for row in range(512)]
        texts = ["".join(part.text for part in document.segments) for document in documents]
        works: dict[str, Callable[[], object]] = {
            "all": lambda scanner=scanner: scanner[0],
            "reading": lambda source=source: [source.document(row) for row in range(512)],
            "encoding": lambda documents=documents: [encoder.tokens(one) for one in documents],
            "the tokenizer alone": lambda texts=texts: [
                encoder.runs._plain.encode_batch_fast([one]) for one in texts
            ],
        }
        least = dict.fromkeys(works, float("inf"))
        for _ in range(40):
            for name, work in works.items():
                before = time.process_time()
                work()
                least[name] = min(least[name], time.process_time() - before)
        found[f"{spans} spans, us"] = {name: round(spent / 512 * 1e6) for name, spent in least.items()}
    return found


def prepared(folder: Path) -> dict[str, object]:
    """CPU of a short text at random, from a prepared folder and from JSONL: the least of 100 rounds over 100.

    No row group is kept, as in a data set that is far larger than what is kept.
    """
    from functools import partial

    from vlcpt import load_processor
    from vlcpt.data.encode.encoder import DocumentEncoder
    from vlcpt.data.encode.vision import EncodingOptions
    from vlcpt.data.prepared.fingerprint import fingerprint
    from vlcpt.data.prepared.write import prepare_source
    from vlcpt.data.rows import tables
    from vlcpt.data.rows.open import SourceConfig
    from vlcpt.data.sources import open_source

    processor, options, count = load_processor(str(ROOT / "vlcpt/demo/base")), EncodingOptions(), 50_000
    encoder = DocumentEncoder(processor, options)
    write_texts(folder / "texts.jsonl", count, 1)
    rows = open_source(SourceConfig(str(folder / "texts.jsonl")))
    made_with = fingerprint(processor, "train", options)
    prepare_source(rows, partial(DocumentEncoder, processor, options), folder / "set", fingerprint=made_with)
    tables._groups = tables._Kept(1)
    sources = {"JSONL": rows, "prepared": open_source(SourceConfig(str(folder / "set")))}
    least = dict.fromkeys(sources, float("inf"))
    rng = random.Random(0)
    for _ in range(100):
        numbers = rng.choices(range(count), k=100)
        for name, source in sources.items():
            before = time.process_time()
            for number in numbers:
                encoder.tokens(source.document(number))
            least[name] = min(least[name], time.process_time() - before)
    found: dict[str, object] = {f"{name}, us": round(spent * 1e4) for name, spent in least.items()}
    return {**found, "ratio": round(least["prepared"] / least["JSONL"], 2)}


def check(folder: Path) -> dict[str, object]:
    """``vlcpt check`` of text documents of 230 characters; a tenth of them first, to see memory grow."""
    found: dict[str, object] = {}
    for count in (CHECKED // 10, CHECKED):
        write_texts(folder / "check.jsonl", count, 1)
        (folder / "my.yaml").write_text(
            f"model_name_or_path: {ROOT / 'vlcpt/demo/base'}\ntrain_data: check.jsonl\n"
            f"output_dir: out-{count}\nmax_length: 2048\nuse_cpu: true\n"
        )
        start, peak = begin(), 0
        command = [sys.executable, "-m", "vlcpt", "check", str(folder / "my.yaml")]
        printed = folder / "printed.txt"
        with printed.open("w") as file, subprocess.Popen(command, stdout=file) as process:
            while process.poll() is None:
                peak = max(peak, memory_of_all(process.pid))
                time.sleep(0.5)
        assert process.returncode == 0, printed.read_text()[-3000:]
        ledger = json.loads((folder / f"out-{count}/ledger.json").read_text())
        assert ledger["total"]["documents"]["used"] == count
        spent = finish(start)
        found[f"{count:,}"] = {
            "wall_s": spent["wall_s"],
            "cpu_s": spent["cpu_s"],
            "all_processes_mb": round(peak / 1e6),
        }
    return found


def begin() -> tuple[float, float, int]:
    """Times and memory now; the peak is counted from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return time.perf_counter(), cpu_seconds(), memory("VmRSS")


def finish(start: tuple[float, float, int]) -> dict[str, float]:
    """What was spent since."""
    wall, cpu, held = start
    return {
        "wall_s": round(time.perf_counter() - wall, 1),
        "cpu_s": round(cpu_seconds() - cpu, 1),
        "held_mb": round(memory() / 1e6),
        "more_mb": round((memory() - held) / 1e6),
    }


def cpu_seconds() -> float:
    """CPU time of this process and of those it waited for."""
    return sum(os.times()[:4])


CASES: dict[str, Callable[[Path], dict[str, object]]] = {
    "index": index,
    "planning": planning,
    "prepared": prepared,
    "check": check,
    "ledger": load_ledger.run,
    "markup": load_fuzz.markup,
    "tokens": load_fuzz.tokens,
    "media": load_fuzz.media,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}. There are {', '.join(CASES)}")
    if arguments.here:
        (name,) = arguments.cases
        with tempfile.TemporaryDirectory() as folder:
            start = begin()
            found = CASES[name](Path(folder))
            print(json.dumps({"case": name, **finish(start), **found}))
        return
    failed = False
    # As the command line sets them.
    settings = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT)}
    for name in arguments.cases or CASES:
        command = [sys.executable, str(Path(__file__)), name, "--here"]
        failed |= subprocess.run(command, env=environment).returncode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
