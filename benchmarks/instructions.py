"""Instructions that this process has executed: a count that, unlike a time, is the same on a busy machine.

The process runs under valgrind's callgrind (`command()`), with counting off until the first call of `executed()`, so
that imports run at a fifth of their speed instead of a fiftieth. It serves `python -m benchmarks.versus --count
instructions`.

Callgrind is steered as C programs do it with `valgrind/callgrind.h`: by client requests, which are a sequence of
machine instructions without effect that valgrind recognizes ("The Client Request mechanism" in its manual). Python has
no such sequence, so it is written into executable memory and called through ctypes. It is that of x86-64.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import shutil
from pathlib import Path

OUTPUT = "LUMEN_CALLGRIND_OUT"
RUNNING_ON_VALGRIND = 0x1001
# Of enum Vg_CallgrindClientRequest: the tool's letters, and the request's number.
DUMP, ZERO, START = ((ord("C") << 24) + (ord("T") << 16) + number for number in (0, 1, 4))
# request(arguments): the six words at `arguments` reach valgrind in rax, its answer comes back in rdx.
CODE = bytes.fromhex(
    "4889f8"  # mov rax, rdi
    "31d2"  # xor edx, edx: the answer without valgrind
    "48c1c703 48c1c70d 48c1c73d 48c1c733"  # rol rdi, 3; 13; 61; 51: 128 bits, which is the same rdi
    "4887db"  # xchg rbx, rbx
    "4889d0 c3"  # mov rax, rdx; ret
)


def command(folder: Path) -> tuple[list[str], dict[str, str]]:
    """What to put before a command, and into its environment, for `executed()`; dumps go to `folder`.

    Raises `RuntimeError` where valgrind is missing, or the machine is of another kind than x86-64.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None or platform.machine() != "x86_64":
        raise RuntimeError("counting instructions needs valgrind (apt-get install valgrind) on x86-64.")
    out = folder / "callgrind"
    options = ["--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}", "--log-file=/dev/null"]
    # Hash seeds change the order of sets, and with it a few instructions.
    return [valgrind, *options], {OUTPUT: str(out), "PYTHONHASHSEED": "0"}


class Counter:
    """`counter()` gives the instructions since its first call, which starts counting."""

    def __init__(self) -> None:
        if not request(RUNNING_ON_VALGRIND):
            raise RuntimeError(
                "this process does not run under valgrind: start it with benchmarks.instructions.command"
            )
        self._dumps = 0
        self._total = 0

    def __call__(self) -> int:
        """The instructions so far, without those of this call."""
        request(DUMP if self._dumps else START)
        if self._dumps:
            path = Path(f"{os.environ[OUTPUT]}.{self._dumps}")
            with path.open() as dump:
                self._total += next(int(line.split()[1]) for line in dump if line.startswith(("summary:", "totals:")))
            path.unlink()
        self._dumps += 1
        request(ZERO)
        return self._total


def request(number: int) -> int:
    """Valgrind's answer to a client request without arguments; 0 where the process does not run under valgrind."""
    return int(_call((ctypes.c_uint64 * 6)(number)))


_memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
_memory.write(CODE)
_call = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)(ctypes.addressof(ctypes.c_char.from_buffer(_memory)))
