"""A merge that is killed when its model is written and not yet compared: ADAPTER OUTPUT."""

import os
import signal
import sys

from vlcpt.model import merge as merging

if __name__ == "__main__":  # doctests are looked for in each file
    merging._compare = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
    merging.merge_adapter(*sys.argv[1:])
