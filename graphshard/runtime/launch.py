"""Start local ranks of a script, as ``torchrun --standalone`` does."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def launch(ranks: int, script: str, arguments: Sequence[str]) -> tuple[int, str]:
    """Run ``script`` as ``ranks`` processes here until all have ended, or one has failed, which ends the rest.

    Returns the exit status, of the rank that failed first, 128 + n for signal n; and one line about it, "" for success.
    """
    # What a rank says of its failure is on stderr already; the agent's account of the process tree would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    command = ["--standalone", f"--nproc-per-node={ranks}", script, *arguments]
    try:
        torchrun.run(torchrun.parse_args(command))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            return 128 - failure.exitcode, f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}"
        return failure.exitcode, f"rank {rank} ended with exit status {failure.exitcode}"
    return 0, ""
