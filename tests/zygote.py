"""Processes that begin with torch and Lumen loaded: a fork takes milliseconds where a start takes seconds.

`start([sys.executable, "job.py", "--steps", "3"], ...)` runs a script (or `-c CODE`, or `-m MODULE`) as
`subprocess.Popen` would: a real process in a session of its own, with its own signals, pipes and exit code. With
`bare=True` torch alone is loaded, for what a test says about an import. An option of the interpreter needs a process
that begins with nothing: `subprocess`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PRELOADED = (
    "torch",
    "torch.distributed",
    "torch._dynamo",  # three seconds, at the first use of checkpointing or of a compiler
    "lumen",
    "lumen.train.runner",
    "lumen.parallel.fsdp",
    "lumen.cli.main",
    "tensorboardX",
    "orbax.checkpoint",
)
OF_EXAMPLES = ("sklearn.datasets", "tyro", "rich.table")
BARE = ("torch",)
ADDRESS = "LUMEN_ZYGOTE"  # where what was forked asks for more, such as a launcher


def forget_jax() -> None:
    """Be a program that has not imported JAX, whose modules stay loaded: Lumen sees who was first."""
    sys.modules.pop("jax", None)


class Process:
    """What `start` gives: the part of `subprocess.Popen` that tests use."""

    def __init__(self, args: Sequence[str], status: socket.socket, pipes: Mapping[str, int]) -> None:
        self.args = args
        self.returncode: int | None = None
        self._status = status
        self.pid = int(self._line())
        self.stdout, self.stderr = (
            os.fdopen(pipes[name], encoding="utf-8", errors="replace") if name in pipes else None
            for name in ("stdout", "stderr")
        )

    def _line(self) -> str:
        text = ""
        while not text.endswith("\n"):
            piece = self._status.recv(1).decode()
            if not piece:
                raise RuntimeError("the process that starts others is gone")
            text += piece
        return text.strip()

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while the process runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._line())
            self._status.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one."""
        if self.returncode is None and not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """All that is still to be read of both pipes; waits for the end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        texts: dict[str, str] = {}
        readers = []
        for name in ("stdout", "stderr"):
            pipe = getattr(self, name)
            if pipe is None or pipe.closed:
                continue
            reader = threading.Thread(target=lambda n=name, p=pipe: texts.update({n: p.read()}), daemon=True)
            reader.start()
            readers.append(reader)
        for reader in readers:
            reader.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        for name in texts:
            getattr(self, name).close()
        return texts.get("stdout"), texts.get("stderr")

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask the process to end."""
        self.send_signal(signal.SIGTERM)


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


class Zygote:
    """The process that forks, with `modules` loaded. It ends with the process that starts it."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if ADDRESS in os.environ:  # this process is a fork of it
            self._control = socket.socket(socket.AF_UNIX)
            self._control.connect("\0" + os.environ[ADDRESS])
            return
        ours, theirs = socket.socketpair()
        # One thread of OpenBLAS too: SciPy would start the others while it is imported, and a fork has none of them.
        environment = {**os.environ, "PYTHONPATH": _path(), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(theirs.fileno()), *modules],
            env=environment,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._control = ours

    def start(self, request: Mapping[str, Any], files: Sequence[int]) -> socket.socket:
        """The socket on which the new process's id and then its exit code arrive."""
        ours, theirs = socket.socketpair()
        body = json.dumps(request).encode()
        head = len(body).to_bytes(4, "big")
        socket.send_fds(self._control, [head], [*files, theirs.fileno()])
        self._control.sendall(body)
        theirs.close()
        return ours

    def lives(self) -> bool:
        """Whether it can be asked."""
        return self._process is None or self._process.poll() is None

    def close(self) -> None:
        """End it, if it was started here; what it has forked goes on."""
        self._control.close()
        if self._process is not None:
            self._process.wait()


# By the process that asks, a fork of which has none yet, and what is loaded.
_zygotes: dict[tuple[int, tuple[str, ...]], Zygote] = {}


@atexit.register
def _close() -> None:
    for key in [key for key in _zygotes if key[0] == os.getpid()]:
        _zygotes.pop(key).close()


def start(
    args: Sequence[str],
    *,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    bare: bool = False,
) -> Process:
    """Start `args`, whose first is this interpreter; `stdout` and `stderr` as `subprocess.Popen` takes them."""
    assert args[0] == sys.executable, args
    modules = BARE if bare else PRELOADED + OF_EXAMPLES
    zygote = _zygotes.get((os.getpid(), modules))
    if zygote is None or not zygote.lives():
        zygote = _zygotes[os.getpid(), modules] = Zygote(modules)
    pipes: dict[str, int] = {}
    files = [os.open(os.devnull, os.O_RDONLY)]
    for name, wanted, default in (("stdout", stdout, 1), ("stderr", stderr, 2)):
        if wanted == subprocess.PIPE:
            pipes[name], there = os.pipe()
        elif wanted == subprocess.STDOUT:
            there = os.dup(files[1])
        elif wanted == subprocess.DEVNULL:
            there = os.open(os.devnull, os.O_WRONLY)
        else:
            there = os.dup(default if wanted is None else wanted)
        files.append(there)
    request = {
        "args": list(args[1:]),
        "cwd": os.fspath(cwd or os.getcwd()),
        "env": dict(os.environ if env is None else env),
    }
    try:
        status = zygote.start(request, files)
    finally:
        for file in files:
            os.close(file)
    return Process(args, status, pipes)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on, each another one."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def launch(args: Sequence[str], size: int, *, env: Mapping[str, str] | None = None, **options: Any) -> list[Process]:
    """`args` as the processes of one world, by rank, as torchrun would start them."""
    (port,) = free_ports(1)
    world = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    joining = [{**world, "RANK": rank, "LOCAL_RANK": rank} for rank in range(size)]
    base = os.environ if env is None else env
    return [start(args, env={**base, **{k: str(v) for k, v in each.items()}}, **options) for each in joining]


def run(args: Sequence[str], *, timeout: float = 120.0, **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run(args, capture_output=True, text=True)`, by a fork."""
    process = start(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        out, err = process.communicate(timeout)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode is not None
    return subprocess.CompletedProcess(args, process.returncode, out or "", err or "")


# ----------------------------------------------------------------------------------------- the other side


def _serve(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Fork for each request; returns in the forked process, with its request, and in this one at the end."""
    children: dict[int, socket.socket] = {}
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")  # a name that the system chooses, gone with its socket
    listener.listen()
    os.environ[ADDRESS] = listener.getsockname().decode()[1:]
    asking = [control]
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    woken.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([*asking, listener, wake], [], [])
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                wake.recv(4096)
            _reap(children)
        if listener in ready:
            asking.append(listener.accept()[0])
        for connection in [each for each in asking if each in ready]:
            head, files, _, _ = socket.recv_fds(connection, 4, 4)
            if not head and connection is control:
                return None
            if not head:
                asking.remove(connection)
                connection.close()
                continue
            request = json.loads(_exactly(connection, int.from_bytes(head, "big")))
            status = socket.socket(fileno=files.pop())
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _count()
                os.setsid()  # before anybody knows of it: a signal to the group must find one
                status.sendall(f"{os.getpid()}\n".encode())
                for each in (*asking, listener, wake, woken, status, *children.values()):
                    each.close()
                return request, files
            children[pid] = status
            for file in files:
                os.close(file)


def _count() -> None:
    """For `make test-times`."""
    if log := os.environ.get("LUMEN_TIMES"):
        with open(log, "a") as file:
            file.write(json.dumps({"kind": "fork"}) + "\n")


def _exactly(control: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += control.recv(count - len(data))
    return data


def _reap(children: dict[int, socket.socket]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        connection = children.pop(pid)
        with contextlib.suppress(OSError):  # nobody may want to know any more
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        connection.close()


def _become(request: dict[str, Any], files: Sequence[int]) -> None:
    """Be the process that was asked for, as far as Python can see."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8", closefd=False, buffering=1 if number == 2 else -1)  # noqa: SIM115
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    for name in [name for name in os.environ if name not in {*request["env"], ADDRESS}]:
        del os.environ[name]
    os.environ.update({name: value for name, value in request["env"].items() if name != ADDRESS})
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _fresh_random()
    sys.path[:0] = [each for each in request["env"].get("PYTHONPATH", "").split(os.pathsep) if each]
    _main(request["args"])


def _fresh_random() -> None:
    """What a process that begins draws is not what another one drew."""
    import random

    import numpy as np

    random.seed()
    np.random.seed()  # noqa: NPY002 (third-party code may still draw from it)


def _main(args: list[str]) -> None:
    import builtins
    import warnings

    while args[0] == "-W":
        action, _, _, category, *_ = [*args[1].split(":"), "", "", ""]
        warnings.simplefilter(action, getattr(builtins, category or "Warning"))  # type: ignore[arg-type]
        args = args[2:]
    if args[0] == "-m":
        sys.argv = args[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        return
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    if args[0] == "-c":
        sys.argv, source, name = ["-c", *args[2:]], args[1], "<string>"
        sys.path.insert(0, "")
    else:
        sys.argv, source, name = args, Path(args[0]).read_text(), args[0]
        main.__file__ = name
        sys.path.insert(0, str(Path(name).resolve().parent))
    exec(compile(source, name, "exec"), main.__dict__)


if __name__ == "__main__":
    import importlib

    sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != Path(__file__).parent]
    for module in sys.argv[2:]:
        importlib.import_module(module)
    sys.modules["torch"].set_num_threads(1)
    forget_jax()
    assert len(os.listdir("/proc/self/task")) <= 2, "a thread was started, which a fork would not have"
    gc.freeze()  # a collection in a fork would copy the memory of all that is loaded
    atexit.unregister(_close)  # this copy of the module is not the one that asks
    if asked := _serve(socket.socket(fileno=int(sys.argv[1]))):
        _become(*asked)
