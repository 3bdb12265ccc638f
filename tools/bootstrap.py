"""The zipapp's __main__: says which Python is needed, in words that older ones understand too."""

import signal
import sys

if sys.version_info < (3, 9):
    sys.exit(
        "nbdtool: error: Python 3.9 or newer is needed, and this is Python %d.%d: "
        "run it as `python3.9 %s ...`" % (sys.version_info[0], sys.version_info[1], sys.argv[0])
    )

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while modules load

from nbdtool.__main__ import main

sys.exit(main())
