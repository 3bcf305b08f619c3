"""One rank of a run up to its Trainer: what it planned, and what it read."""

import json
import os
import sys
import time
from pathlib import Path

from vlcpt.config.yaml import load_config
from vlcpt.data.plan import scan
from vlcpt.data.sources import DocumentSource
from vlcpt.runs import train

read = DocumentSource.document


def main(folder, options):
    rank = os.environ["RANK"]

    def note_and_read(self, number):
        with (folder / f"read-{rank}").open("a") as notes:
            notes.write(f"{self.rows.source(number).line}\n")
        time.sleep(0.02)  # for the other rank to come while something is left to read
        return read(self, number)

    def tell_plans(*, train_dataset, eval_dataset, **_):
        plans = {
            name: {"digest": one.digest, "ledger": one.ledger.as_json()}
            for name, one in {"train": train_dataset, **eval_dataset}.items()
        }
        (folder / f"plans-{rank}").write_text(json.dumps(plans))
        raise SystemExit(0)

    scan.PIECE_ROWS = 4
    DocumentSource.document = note_and_read
    train.CPTTrainer = tell_plans
    train.train_run(load_config(folder / "my.yaml", options))


if __name__ == "__main__":  # collecting doctests imports it
    main(Path(sys.argv[1]), sys.argv[2:])
