"""What reading some rows gave, as the bytes of a file: arrays and JSON, nothing that could run."""

from __future__ import annotations

import json
from collections import Counter
from io import BytesIO

import numpy as np

from vlcpt.data.file_states import FileState
from vlcpt.data.ledger import Dropped
from vlcpt.data.scanning import BadRow, Scan


def scan_to_bytes(scan: Scan) -> bytes:
    """A scan as bytes, from which :func:`scan_from_bytes` makes an equal one.

    Args:
        scan: Without an error: what stops a run is found again, and never stored.
    """
    assert scan.error is None
    rest = {
        "rows": scan.rows,
        "marks": scan.marks,
        "dropped_tokens": scan.dropped_tokens,
        "unused": [[one.row, vars(one.dropped), one.message, one.is_bad, one.files] for one in scan.unused],
    }
    text = np.frombuffer(json.dumps(rest).encode(), dtype=np.uint8)
    file = BytesIO()
    np.savez_compressed(file, documents=scan.documents, parts=scan.parts, rest=text)
    return file.getvalue()


def scan_from_bytes(content: bytes) -> Scan:
    """The scan that :func:`scan_to_bytes` wrote.

    Example:
        >>> scan = Scan(np.ones((1, 12), np.int32), np.ones((1, 5), np.int32), rows=1)
        >>> scan_from_bytes(scan_to_bytes(scan)).rows
        1
    """
    with np.load(BytesIO(content), allow_pickle=False) as stored:
        rest = json.loads(stored["rest"].tobytes())
        return Scan(
            documents=stored["documents"],
            parts=stored["parts"],
            rows=rest["rows"],
            marks=Counter(rest["marks"]),
            dropped_tokens=Counter(rest["dropped_tokens"]),
            unused=[
                BadRow(row, Dropped(**dropped), message, is_bad, tuple(FileState(*file) for file in files))
                for row, dropped, message, is_bad, files in rest["unused"]
            ],
        )
