"""python -m sparsenlp.demo DIRECTORY THREADS STAGE ...: what `sparsenlp demo` starts for each group of stages.

Progress goes to standard output as JSON lines; the last line on standard error says why it failed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

from ..interrupt import Terminated, terminable
from .children import do_stages


def main(arguments: list[str]) -> int:
    directory, threads, *names = arguments
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background hands down that it is ignored
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as events:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # so that nobody else writes among the events
        torch.set_num_threads(int(threads))
        try:
            with terminable():
                do_stages(Path(directory), names, lambda event: print(json.dumps(event), file=events, flush=True))
        except KeyboardInterrupt as error:
            return 143 if isinstance(error, Terminated) else 130
        except Exception as error:
            traceback.print_exc()
            print(" ".join((str(error) or type(error).__name__).split()), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
