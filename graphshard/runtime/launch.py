"""Start local ranks of a script, as ``torchrun --standalone`` does."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def launch(ranks: int, script: str, arguments: Sequence[str]) -> tuple[int, str]:
    """Run ``script`` as ``ranks`` processes here until all have ended, or one has failed, which ends the rest.

    Returns the exit status, of the rank that failed first, 128 + n for signal n, which this process may have got as
    well; and one line about it, "" for success.
    """
    # What a rank says of its failure is on stderr already; the agent's account of the process tree would bury it.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    command = ["--standalone", f"--nproc-per-node={ranks}", script, *arguments]
    try:
        torchrun.run(torchrun.parse_args(command))
    except SignalException as error:
        return 128 + error.sigval, f"{ranks} ranks were ended by {error.sigval.name}"
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            return 128 - failure.exitcode, f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}"
        return failure.exitcode, f"rank {rank} ended with exit status {failure.exitcode}"
    return 0, ""
