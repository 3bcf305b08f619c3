"""What checkpoints of two processes take, as it was foreseen and as it was written.

``torchrun --nproc_per_node 2 -m tests.training.foreseen_sizes FOLDER``
"""

import json
import os
import sys
from pathlib import Path

from tests.ranks import allow_deepspeed
from tests.training.layouts import ALL_ADAPTERS, FULL, LANGUAGE, MIXED, Run, train
from vlcpt.training.checkpoints import callback

BF16 = {"dtype": "bfloat16"}
RUNS = {
    **{f"{engine} full": Run(engine, FULL) for engine in ("zero1", "zero2", "zero3")},
    **{f"{engine} full, language alone": Run(engine, LANGUAGE) for engine in ("zero2", "zero3")},
    **{f"{engine} lora": Run(engine, ALL_ADAPTERS) for engine in ("zero1", "zero2", "zero3")},
    **{f"{engine} lora, merger in full": Run(engine, MIXED) for engine in ("zero2", "zero3")},
    **{f"{engine} full, bf16": Run(engine, FULL | BF16, 4, {"bf16": True}) for engine in ("zero2", "zero3")},
}


def main(folder: Path) -> None:
    """Train a step of each, save it, and note the two sizes."""
    foreseen: list[int] = []
    needed_bytes = callback.needed_bytes

    def noted(*args: object) -> int:
        foreseen.append(needed_bytes(*args))
        return foreseen[-1]

    callback.needed_bytes = noted
    found = {}
    for name, run in RUNS.items():
        settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}
        one = Run(run.engine, run.model, 4, run.settings | settings)
        train(one, folder / name, base=str(folder / "base"), processes=2)
        print(name, flush=True)
        if os.environ["RANK"] == "0":
            files = [path for path in (folder / name / "checkpoint-1").rglob("*") if path.is_file()]
            found[name] = [foreseen.pop(), sum(path.stat().st_size for path in files)]
    if os.environ["RANK"] == "0":
        (folder / "sizes.json").write_text(json.dumps(found))


if __name__ == "__main__":
    allow_deepspeed()
    main(Path(sys.argv[1]))
