"""Run scripts with ``--help``, each forked from one process that has imported what takes seconds: SCRIPT …

Prints for each its exit code and what it said, as JSON.
"""

import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path


def help_of(script: Path) -> tuple[int, str]:
    """The exit code of a script, and what it prints."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        if not (child := os.fork()):
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            os._exit(run(script))
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read()


def run(script: Path) -> int:
    """Run a script in this process, as Python would."""
    sys.argv, sys.path[0] = [str(script), "--help"], str(script.parent)
    code: object = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:  # whatever it ends with is what is looked for
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    import peft
    import transformers

    import vlcpt.training.trainer

    assert peft
    assert transformers
    assert vlcpt
    print(json.dumps({one: help_of(Path(one)) for one in sys.argv[1:]}))
