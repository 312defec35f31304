"""torchrun with a sentence instead of a traceback: `python -m chatglm_ptuning.training.launch TORCHRUN_ARGUMENTS`."""

import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import main as torchrun


def main(arguments: list[str]) -> int:
    """Run the processes.

    Returns:
        The exit code of the first one that failed, 130 if they were interrupted; 0 otherwise.
    """
    try:
        torchrun(arguments)
    except SignalException:
        return 130  # the first process has said what is saved
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode  # it has said why
        name = signal.Signals(-failure.exitcode).name
        print(
            f"error: process {rank} of the run was killed by {name}; look into the system's log, then go on with "
            "training.resume_from_checkpoint=true",
            file=sys.stderr,
        )
        return 1
    except RendezvousError as error:
        reason = str(error) or type(error).__name__
        print(
            f"error: the hosts of a run must meet at RENDEZVOUS, but they did not ({reason}); when the last run has "
            "ended everywhere, start the command on each of NUM_HOSTS hosts with the same RENDEZVOUS",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
