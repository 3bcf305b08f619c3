"""Memory and time of the loss at the shapes of the 3B: all logits, those of the targets, and chunks of them.

    python benchmarks/loss.py                          # five repetitions a side, about five minutes
    python benchmarks/loss.py --repeats 2 --output x.json

2,427 tokens of which 400 are targets, 2,048 wide, 151,936 logits each, float32: forward and backward of the
output layer and the loss alone. The sides:

    all       logits of every token, then cross-entropy with -100, as transformers computes it
    targets   logits of the targets, all at once (``loss_chunk: 0``)
    chunks    logits of 128 targets at a time (the default)
    chunks-32, chunks-512   other sizes, by which the default was chosen
    torch     torch.nn.functional.linear_cross_entropy on the targets, where this torch has it

for a head that is frozen and one that trains. Each repetition is a process of its own, every other one runs
the sides in the opposite order. Its time is CPU time, its memory the kernel's peak (VmHWM) less what the
process held before. In that are the gradients that it leaves, which every side must hold. The losses of all
sides, and their gradients, are compared first; a difference stops the benchmark.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import memory, pin

TOKENS, TARGETS, WIDTH, VOCABULARY = 2427, 400, 2048, 151_936
CHUNKS = {"chunks": 128, "chunks-32": 32, "chunks-512": 512}  # targets
SIDES = ("all", "targets", *CHUNKS, "torch")
HEADS = ("frozen", "trained")


def run_side(side: str, head: str) -> dict[str, float]:
    """One pass, forward and backward: seconds, bytes, and what it computed."""
    import torch

    from vlcpt.training.loss import chunked_nll

    pin()
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    layer.weight.data.copy_(torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.02)
    layer.requires_grad_(head == "trained")
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, requires_grad=True)
    labels = torch.full((TOKENS,), -100)
    places = torch.randperm(TOKENS - 1, generator=generator)[:TARGETS].sort().values
    labels[places + 1] = torch.randint(VOCABULARY, (TARGETS,), generator=generator)
    ids = labels[places + 1]
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here
    before, start = memory("VmRSS"), time.process_time()
    if side == "all":
        logits = layer(hidden).float()
        loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100)
    elif side == "targets":
        loss = torch.nn.functional.cross_entropy(layer(hidden[places]).float(), ids)
    elif side == "torch":
        loss = torch.nn.functional.linear_cross_entropy(hidden[places], layer.weight, ids)
    else:
        size = CHUNKS[side]
        loss = chunked_nll(layer, hidden[places], ids, size, layer.forward).mean()
    loss.backward()
    seconds = time.process_time() - start
    peak = memory("VmHWM") - before
    assert hidden.grad is not None
    gradients = [one for one in (hidden.grad, layer.weight.grad) if one is not None]
    found = {
        "seconds": seconds,
        "bytes": peak,
        "gradients": float(sum(one.nbytes for one in gradients)),
        "loss": float(loss.detach()),
        "hidden": float(hidden.grad.double().norm()),
    }
    if layer.weight.grad is not None:
        found["weight"] = float(layer.weight.grad.double().norm())
    return found


def child(side: str, head: str) -> dict[str, float]:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--side", side, "--head", head]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def has_torchs_own() -> bool:
    """Whether this torch has a function for it."""
    import torch

    return hasattr(torch.nn.functional, "linear_cross_entropy")


def compare(runs: dict[str, list[dict[str, float]]]) -> None:
    """Stop if a side computed something else."""
    plain = runs["all"][0]
    for side, found in runs.items():
        for name in ("loss", "hidden", "weight"):
            if name in plain and abs(found[0][name] / plain[name] - 1) > 1e-5:
                sys.exit(f"{side}: {name} is {found[0][name]}, and {plain[name]} with all logits.")


def main() -> None:
    """Run all sides, and print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="Each side once.")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--sides", nargs="+", choices=SIDES[1:], help="Only these, beside all logits.")
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--head", choices=HEADS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run_side(args.side, args.head)))
        return
    result = {}
    sides = ("all", *(args.sides or (side for side in SIDES[1:] if side != "torch" or has_torchs_own())))
    for head in HEADS:
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for repeat in range(1 if args.quick else args.repeats):
            for side in sides if repeat % 2 == 0 else reversed(sides):
                runs[side].append(child(side, head))
            if repeat == 0:
                compare(runs)
        result[head] = {
            side: {
                "seconds": statistics.median(one["seconds"] for one in found),
                "MiB": statistics.median(one["bytes"] for one in found) / 2**20,
                "MiB of gradients": found[0]["gradients"] / 2**20,
                "times faster": statistics.median(
                    a["seconds"] / b["seconds"] for a, b in zip(runs["all"], found, strict=True)
                ),
                "times less memory": statistics.median(
                    a["bytes"] / b["bytes"] for a, b in zip(runs["all"], found, strict=True)
                ),
            }
            for side, found in runs.items()
        }
        text = json.dumps(result, indent=1)
        if args.output:  # each head when it is done: all of them take minutes
            args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
