"""Damage to files, for the fuzzers here and in benchmarks. Without torch, whose memory would hide theirs."""

import random


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A file with some bytes changed, cut out or put in, mostly in the header; or cut short."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(min(len(changed), rng.choice((60, 400, len(data)))))
        how = rng.randrange(8)
        if how < 3:
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif how == 3:
            del changed[at : at + rng.randrange(1, 20)]
        elif how == 4:
            changed[at:at] = rng.randbytes(rng.randrange(1, 8))
        elif how < 7:
            changed[at : at + 4] = rng.choice((bytes(4), b"\xff" * 4, b"\0\0\0\1", b"\x7f\xff\xff\xff"))
        else:
            del changed[at + 1 :]
        changed = changed or bytearray(b"\0")
    return bytes(changed)
