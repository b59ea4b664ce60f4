"""One of the processes of ``scale run --processes``: reads what to train from stdin, and says on stdout how it goes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from typing import Any

from diffattn.errors import DiffattnError, error_to_json


def main() -> int:
    """Trains what nobody else trains; the exit status is 0, 1 for an error that was told, 130 if it was stopped."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # What libraries print is for a person, not for the process that reads this one.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(message: dict[str, Any]) -> None:
        # Whoever read it has died; the end of stdin says so too.
        with contextlib.suppress(BrokenPipeError):
            answers.write(json.dumps(message) + "\n")

    try:
        job = json.loads(sys.stdin.readline())
        threading.Thread(target=_watch, daemon=True).start()
        from diffattn.scaling.ladder import run_ladder
        from diffattn.scaling.messages import options_from_json, progress_to_json
        from diffattn.train.callbacks import quiet

        quiet()
        try:
            run_ladder(
                options_from_json(job["options"]), out=job["folder"], command=job["command"],
                on_progress=lambda progress: tell(progress_to_json(progress)),
            )  # fmt: skip
        except DiffattnError as error:
            tell({"error": error_to_json(error)})
            return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _watch() -> None:
    """Stops this process once the process that started it has ended."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
