"""A DeepSpeed engine around a model whose params are a state's, and a loss that is any function of them."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lumen.core import _torch_compat
from lumen.core.module import Apply, param_slots, skeleton_of
from lumen.core.versions import install_extra, version_of
from lumen.errors import OrderError
from lumen.parallel.comm.init import leave_at_exit
from lumen.parallel.comm.process_groups import close_on_leave
from lumen.parallel.deepspeed.config import Setup
from lumen.parallel.deepspeed.optimizer import Adapter
from lumen.parallel.deepspeed.partitions import Span, find_spans

_BUILD = 20 * 60.0  # seconds that no build of one extension takes


def library(device: torch.device) -> Any:
    """The package, imported for this kind of device, without its log messages below warnings."""
    if version_of("deepspeed") is None:
        raise ImportError(f"lm.deepspeed needs DeepSpeed: {install_extra('deepspeed')}")
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    with quiet(), _without("mlflow"):
        package = importlib.import_module("deepspeed")
    close_on_leave(_library)
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(os.environ.get("DS_LOG_LEVEL", "WARNING").upper())
    if _is_relevant not in logger.filters:
        logger.addFilter(_is_relevant)
    return package


class _Library:
    """The process groups that DeepSpeed keeps in tables of its modules."""

    def close(self) -> None:
        """Destroy the process groups by DeepSpeed's own function, which empties the tables."""
        comm = importlib.import_module("deepspeed.comm")
        if comm.is_initialized() and dist.is_initialized():
            comm.destroy_process_group()


_library = _Library()


def _is_relevant(record: logging.LogRecord) -> bool:
    """Whether a message holds for Lumen: that its optimizer is untested does not."""
    return "untested optimizer" not in record.getMessage()


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Hide a package that DeepSpeed would import, for its autotuner alone; the import takes seconds."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def quiet() -> warnings.catch_warnings:
    """A context without the warnings that DeepSpeed's own use of torch causes."""
    return warnings.catch_warnings(action="ignore")


def init_single_process_group(device: torch.device) -> None:
    """A process group for a single process, unless there is one: an engine needs it."""
    if dist.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", "0")  # which the engine reads
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    atexit.register(leave_at_exit, os.getpid())


class Root(nn.Module):
    """The model, whose forward runs any function."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        """The result of `run()`."""
        return run()


class Engine:
    """The engine, the tables of its params, and the spans that this rank updates."""

    def __init__(self, apply: Apply, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], setup: Setup) -> None:
        device = next(iter(params.values())).device
        init_single_process_group(device)
        self.setup = setup
        self.shapes = {name: p.shape for name, p in params.items()}
        self._twins = {id(apply.train()), id(apply.eval())}
        net = _copy_of_model(apply, params, buffers)
        slots = param_slots(net)
        tables = {name: (table, key) for table, key, name in reversed(slots) if name in params}
        self._buffers = [slot for slot in slots if slot[2] not in params]
        self.params: dict[str, nn.Parameter] = {name: tables[name][0][tables[name][1]] for name in params}
        self.adapter = Adapter(list(self.params.values()))
        deepspeed = library(device)
        with quiet(), _linear() as torchs:
            self.engine, *_ = deepspeed.initialize(
                model=Root(net), optimizer=self.adapter, config=setup.config, dist_init_required=False
            )
            self._linear = torchs["linear"]  # at stage 3, one of the engine's own
        self.optimizer = self.engine.optimizer
        # Looked up again: at stage 3 the engine has replaced the tables by its own, which gather.
        self._net: nn.Module = self.engine.module.net
        modules = dict(self._net.named_modules(remove_duplicate=False))
        self._tables = {name: (modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in params}
        self._inside = False

    @functools.cached_property
    def spans(self) -> dict[str, Span]:
        """This rank's span of each param, by name."""
        return find_spans(self.engine, self.params, self.shapes, self.setup.stage)

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        """`run()` as the engine's forward pass."""
        self._inside = True
        try:
            with quiet(), _linear(self._linear):
                return self.engine(run)  # type: ignore[no-any-return]
        finally:
            self._inside = False

    def backward(self, objective: Tensor, last: bool) -> None:
        """Add the gradients of `objective`; after the `last` of an update they are reduced over the ranks."""
        with quiet(), _linear(self._linear):  # recomputation runs here
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(objective, scale_wrt_gas=False)
            if not last:
                self.engine.step()

    def step(self, limit: float) -> None:
        """The update, with gradients whose norm is more than `limit` scaled down to it (0 is no limit)."""
        if limit and self.setup.stage:
            self.optimizer.clip_grad = limit
        with quiet():
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.step()

    @torch.no_grad()
    def drop_gradients(self, names: Iterable[str]) -> None:
        """Set the gradients of these params, which the update does not use, to zero, for the norm."""
        tools = importlib.import_module("deepspeed.utils")
        norms: dict[Any, Any] = getattr(self.optimizer, "norm_for_param_grads", {})  # computed early, under offload
        for name in names:
            param: Any = self.params[name]
            if self.setup.stage == 3:
                tools.safe_set_local_grad(param, torch.zeros_like(param.ds_tensor, dtype=torch.float32))
            elif self.setup.stage:
                if param._hp_mapping is not None:
                    param._hp_mapping.get_lp_grad_fragment(param._index_in_param_group).zero_()
            elif param.grad is not None:
                param.grad.zero_()
            if norms:
                norms.pop(self.optimizer.get_param_id(param), None)

    def live(self, name: str) -> Tensor:
        """The param for the loss function."""
        if self.setup.stage < 3:
            return self.params[name].view(self.shapes[name])
        module, key = self._tables[name]
        param: Any = _torch_compat.own_params(module)[key]  # which gathers it, and frees it afterwards
        return param  # type: ignore[no-any-return]

    def full_param(self, name: str) -> Tensor:
        """The param of stage 3, gathered: for the loss function while it runs, otherwise a copy."""
        if self._inside:
            return self.live(name)
        deepspeed = library(self.params[name].device)
        with torch.no_grad(), quiet(), deepspeed.zero.GatheredParameters([self.params[name]]):
            return self.params[name].detach().clone()

    def run(
        self, target: Apply, buffers: Mapping[str, Tensor], args: Any, kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """The model of stage 3 with its own params, by the engine's hooks, and these buffers."""
        if id(target) not in self._twins:
            raise OrderError(
                "at ZeRO's stage 3 the engine runs the model's own forward, and this step applies the model in another"
                ' form (Apply.calling, say). Use {"zero_optimization": {"stage": 2}}, or lm.fsdp().'
            )
        before = [table[key] for table, key, _ in self._buffers]
        self._net.train(target.module.training)
        try:
            for table, key, name in self._buffers:
                table[key] = buffers[name] if name in target.frozen else buffers[name].clone()
            with quiet():
                result = self._net(*args, **kwargs)
            after = {name: table[key] for table, key, name in self._buffers}
            return result, {name: after[name] for name in buffers}
        finally:
            for (table, key, _), tensor in zip(self._buffers, before, strict=True):
                table[key] = tensor

    @torch.no_grad()
    def load(self, params: Mapping[str, Tensor]) -> None:
        """Copy these values into the engine."""
        for name, span in self.spans.items():
            flat = params[name].reshape(-1)
            entries = flat[span.start : span.start + span.master.numel()]
            span.master.copy_(entries)
            param: Any = self.params[name]
            if self.setup.stage == 3:
                param.ds_tensor.view(-1)[: entries.numel()].copy_(entries)
            elif self.setup.stage:
                param.copy_(params[name].view(param.shape))

    def gradient(self, name: str) -> Tensor | None:
        """The full gradient of the mean loss, on every rank."""
        tools = importlib.import_module("deepspeed.utils")
        with quiet():
            grad = tools.safe_get_full_grad(self.params[name])
        return None if grad is None else grad.view(self.shapes[name])

    def close(self) -> None:
        """Release hooks, memory and process groups, even while there are references to the engine or its params."""
        with quiet():
            self.engine.destroy()
        for param in self.params.values():
            vars(param).clear()
        for owner in (self.engine, self.optimizer, getattr(self.optimizer, "parameter_offload", None)):
            if owner is not None:
                _forget_groups(vars(owner))


@contextlib.contextmanager
def _linear(function: Callable[..., Tensor] | None = None) -> Iterator[dict[str, Any]]:
    """A context in which `torch.nn.functional` has this `linear`; afterwards it has its former one.

    DeepSpeed's stage 3 replaces that function for the rest of the process, and other steps must not call it.
    """
    names = vars(nn.functional)
    before = names["linear"]
    names["linear"] = function or before
    try:
        yield names
    finally:
        names["linear"] = before


def _forget_groups(attributes: dict[str, Any]) -> None:
    """Remove process groups from an object: some of DeepSpeed's hooks cannot be removed and refer to its engine."""
    for name, value in attributes.items():
        values = value if isinstance(value, list | tuple) else [value]
        if any(issubclass(type(item), dist.ProcessGroup) for item in values):
            attributes[name] = None


def _copy_of_model(apply: Apply, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with its own params; each call replaces its buffers, and frozen params are buffers.

    A param without dims gets one: the engine accepts no scalars.
    """
    net = skeleton_of(apply.train().module)
    own = {name: nn.Parameter(p.detach().clone().view(p.shape or 1)) for name, p in params.items()}
    frozen: list[tuple[nn.Module, str, Tensor]] = []
    tables = {
        id(table): sub
        for sub in net.modules()
        for table in (_torch_compat.own_params(sub), _torch_compat.own_buffers(sub))
    }
    for table, key, name in param_slots(net):
        if name in own:
            table[key] = own[name]
        elif table is _torch_compat.own_params(tables[id(table)]):
            frozen.append((tables[id(table)], key, buffers[name].detach()))
        else:
            table[key] = buffers[name].detach().clone()
    for sub, key, tensor in frozen:
        del _torch_compat.own_params(sub)[key]
        sub.register_buffer(key, tensor, persistent=False)
    return net


def missing() -> list[str]:
    """What DeepSpeed needs and this machine lacks, in words; nothing where DeepSpeed is not installed.

    >>> all(isinstance(line, str) for line in missing())
    True
    """
    if version_of("deepspeed") is None:
        return []
    lines = []
    if importlib.util.find_spec("ninja") is None:
        lines.append("ninja, with which it compiles its own kernels: pip install ninja")
    if torch.cuda.is_available() and "CUDA_HOME" not in os.environ and not os.path.isdir("/usr/local/cuda"):
        lines.append("the CUDA toolkit (nvcc) for its own kernels: install it, and set CUDA_HOME")
    return lines + [
        f"a build of its kernels that was interrupted, for which others wait: rm {lock}" for lock in stale_locks()
    ]


def stale_locks() -> list[Path]:
    """Locks of builds of kernels whose process has ended; every later build waits for them without end.

    A process that builds has its lock open; one that is killed leaves the file. Where the system does not list open
    files, a lock is stale once it is older than any build takes.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or _torch_compat.user_cache_dir(appname="torch_extensions"))
    locks = sorted(root.glob("**/lock"))
    open_files = _open_files() if locks else None
    return [lock for lock in locks if _is_stale(lock, open_files)]


def _is_stale(lock: Path, open_files: set[tuple[int, int]] | None) -> bool:
    try:
        status = lock.stat()
    except FileNotFoundError:  # the build has ended
        return False
    if open_files is not None and status.st_uid == os.getuid():
        return (status.st_dev, status.st_ino) not in open_files
    return time.time() - status.st_mtime > _BUILD


def _open_files() -> set[tuple[int, int]] | None:
    """The open files of this user's processes; None where the system does not list them."""
    files = set()
    for table in Path("/proc").glob("[0-9]*/fd"):
        try:
            for descriptor in table.iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed in the meantime
                    status = descriptor.stat()
                    files.add((status.st_dev, status.st_ino))
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended in the meantime, or another user's
            continue
    return files or None
