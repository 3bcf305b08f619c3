"""One rank of a run up to its Trainer, for tests/test_run_ranks.py: what it planned, and what it encoded."""

import json
import os
import sys
from pathlib import Path

from vlcpt import runs
from vlcpt.config_reading import load_config
from vlcpt.data import scanning
from vlcpt.data.encoding import DocumentEncoder

FOLDER = Path(sys.argv[1])
RANK = os.environ["RANK"]
encode = DocumentEncoder.tokens


def note_and_encode(self, document):
    with (FOLDER / f"encoded-{RANK}").open("a") as notes:
        notes.write(f"{document.source.line}\n")
    return encode(self, document)


def tell_plans(*, train_dataset, eval_dataset, **_):
    plans = {
        name: {"digest": one.digest, "ledger": one.ledger.as_json()}
        for name, one in {"train": train_dataset, **eval_dataset}.items()
    }
    (FOLDER / f"plans-{RANK}").write_text(json.dumps(plans))
    raise SystemExit(0)


scanning.PIECE_ROWS = 4
DocumentEncoder.tokens = note_and_encode
runs.CPTTrainer = tell_plans
runs.train_run(load_config(FOLDER / "my.yaml", sys.argv[2:]))
