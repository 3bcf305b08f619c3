"""A command that may write no file of more kilobytes: ``python -m tests.limited KILOBYTES COMMAND…``"""

import resource
import sys

from vlcpt.__main__ import main

if __name__ == "__main__":
    _, kilobytes, *command = sys.argv
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(kilobytes) << 10,) * 2)
    sys.argv = ["vlcpt", *command]
    main()
