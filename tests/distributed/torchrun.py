"""torchrun, whose workers are forks of the process that forked it: `torchrun.py ARGUMENTS`, started by `zygote.start`.

Its agent, rendezvous, monitor and restarts are torch's own.
"""

from __future__ import annotations

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from tests import zygote


def forked(self, args, env):
    """In place of `subprocess.Popen`."""
    python, *rest = args
    stdout, stderr = (None if file is None else file.fileno() for file in (self._stdout, self._stderr))
    return zygote.start([python, *(each for each in rest if each != "-u")], env=env, stdout=stdout, stderr=stderr)


if __name__ == "__main__":
    SubprocessHandler._popen = forked
    run.main(sys.argv[1:])
