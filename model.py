"""What the stages share: faces, the gray network, data, training, inference, checkpoints, command line."""

import functools
import sys
from collections.abc import Callable

EMOTIONS = ("angry", "disgusted", "happy", "sad", "surprised")


# --- command line ---


def one_line_errors(main: Callable) -> Callable:
    """Decorate a script's `main`: a user's mistake becomes one line on stderr, not a traceback.

    ValueError and OSError (their message names the thing, the expectation and the remedy) end with exit
    code 1, Ctrl-C with 130.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapped
