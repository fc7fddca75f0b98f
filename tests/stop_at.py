"""Run a script in a process that sends itself a signal at an exact moment.

    python tests/stop_at.py SIGNAL NUMBER NAME SCRIPT [OPTION ...]

The signal comes when the script is about to write to a file whose name ends with NAME, or to rename another
to it, for the NUMBERth time. The script may use the tiny network.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]
import tiny_resnet  # noqa: E402, F401 (registers it)

stop, number, name, *sys.argv = sys.argv[1:]
left = int(number)


def send_signal(event: str, args: tuple) -> None:
    global left  # noqa: PLW0603 (an audit hook stays, so there is one)
    if event == "open":
        path, mode = args[0], args[1] or "r"
        is_it = not isinstance(path, int) and mode[0] in "wax" and os.fsdecode(path).endswith(name)
    else:
        is_it = event == "os.rename" and os.fsdecode(args[1]).endswith(name)
    left -= is_it
    if is_it and left == 0:
        os.kill(os.getpid(), signal.Signals[stop])


sys.addaudithook(send_signal)
runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
