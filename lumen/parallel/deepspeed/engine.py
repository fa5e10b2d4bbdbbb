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
from torch._appdirs import user_cache_dir

from lumen.core.module import Apply, param_slots, skeleton_of
from lumen.core.versions import version_of
from lumen.errors import OrderError
from lumen.parallel.comm.init import leave_at_exit
from lumen.parallel.comm.process_groups import close_on_leave
from lumen.parallel.deepspeed.config import Setup
from lumen.parallel.deepspeed.optimizer import Adapter
from lumen.parallel.deepspeed.partitions import Span, find_spans

_BUILD = 20 * 60.0  # seconds that no build of one extension takes


def library(device: torch.device) -> Any:
    """The package, imported for this kind of device, with its messages of less than a warning turned off."""
    if version_of("deepspeed") is None:
        raise ImportError("lm.deepspeed needs DeepSpeed: pip install 'lumen-torch[deepspeed]'")
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    with quiet(), _without("mlflow"):
        found = importlib.import_module("deepspeed")
    close_on_leave(_library)
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(os.environ.get("DS_LOG_LEVEL", "WARNING").upper())
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)
    return found


class _Library:
    """What DeepSpeed itself keeps of a world: groups, in tables of its modules."""

    def close(self) -> None:
        """Destroy the world in DeepSpeed's way, which empties them."""
        comm = importlib.import_module("deepspeed.comm")
        if comm.is_initialized() and dist.is_initialized():
            comm.destroy_process_group()


_library = _Library()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message says what Lumen does not know: that its optimizer is untested is not so."""
    return "untested optimizer" not in record.getMessage()


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """With a package hidden that DeepSpeed imports where it is there, for its autotuner alone, which takes seconds."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def quiet() -> warnings.catch_warnings:
    """Without the warnings that DeepSpeed's own use of torch draws."""
    return warnings.catch_warnings(action="ignore")


def meet(device: torch.device) -> None:
    """A world of one for a process that is alone, which an engine needs too."""
    if dist.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", "0")  # which the engine asks for
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    atexit.register(leave_at_exit, os.getpid())


class Root(nn.Module):
    """The model, and as its forward whatever is to be computed with it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        """What `run` gives."""
        return run()


class Engine:
    """The engine, the tables in which its params stand, and the spans that this process updates."""

    def __init__(self, apply: Apply, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], setup: Setup) -> None:
        device = next(iter(params.values())).device
        meet(device)
        self.setup = setup
        self.shapes = {name: p.shape for name, p in params.items()}
        self._twins = {id(apply.train()), id(apply.eval())}
        net = _made_real(apply, params, buffers)
        places = param_slots(net)
        tables = {name: (table, key) for table, key, name in reversed(places) if name in params}
        self._buffers = [place for place in places if place[2] not in params]
        self.params: dict[str, nn.Parameter] = {name: tables[name][0][tables[name][1]] for name in params}
        self.adapter = Adapter(list(self.params.values()))
        deepspeed = library(device)
        with quiet(), _linear() as torchs:
            self.engine, *_ = deepspeed.initialize(
                model=Root(net), optimizer=self.adapter, config=setup.config, dist_init_required=False
            )
            self._linear = torchs["linear"]  # at stage 3, one of the engine's own
        self.optimizer = self.engine.optimizer
        # Looked up anew: at stage 3 the engine has put tables of its own in their place, which gather.
        self._net: nn.Module = self.engine.module.net
        modules = dict(self._net.named_modules(remove_duplicate=False))
        self._tables = {name: (modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in params}
        self._inside = False

    @functools.cached_property
    def spans(self) -> dict[str, Span]:
        """By param."""
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
        """Add the gradients of `objective`; after the `last` of an update they are joined over the processes."""
        with quiet(), _linear(self._linear):  # what is recomputed runs here
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
        """Set the gradients of these params, which the update does not use, to zero: the norm leaves them out."""
        tools = importlib.import_module("deepspeed.utils")
        norms: dict[Any, Any] = getattr(self.optimizer, "norm_for_param_grads", {})  # taken early, under offload
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
        """The param as the loss is to see it."""
        if self.setup.stage < 3:
            return self.params[name].view(self.shapes[name])
        module, key = self._tables[name]
        found: Any = module._parameters[key]  # which gathers it, and lets it go afterwards
        return found  # type: ignore[no-any-return]

    def whole(self, name: str) -> Tensor:
        """The param of stage 3, gathered: for the loss that is being computed, or a copy."""
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
                given = buffers[name]
                table[key] = given if name in target.frozen else given.clone()
            with quiet():
                out = self._net(*args, **kwargs)
            after = {name: table[key] for table, key, name in self._buffers}
            return out, {name: after[name] for name in buffers}
        finally:
            for (table, key, _), tensor in zip(self._buffers, before, strict=True):
                table[key] = tensor

    @torch.no_grad()
    def load(self, params: Mapping[str, Tensor]) -> None:
        """Take these values."""
        for name, span in self.spans.items():
            flat = params[name].reshape(-1)
            mine = flat[span.start : span.start + span.master.numel()]
            span.master.copy_(mine)
            held: Any = self.params[name]
            if self.setup.stage == 3:
                held.ds_tensor.view(-1)[: mine.numel()].copy_(mine)
            elif self.setup.stage:
                held.copy_(params[name].view(held.shape))

    def gradient(self, name: str) -> Tensor | None:
        """The whole gradient of the loss's mean by rows, on every process."""
        tools = importlib.import_module("deepspeed.utils")
        with quiet():
            found = tools.safe_get_full_grad(self.params[name])
        return None if found is None else found.view(self.shapes[name])

    def close(self) -> None:
        """Let go of the engine's hooks and memory, and of process groups, whoever holds the engine or its params."""
        with quiet():
            self.engine.destroy()
        for param in self.params.values():
            vars(param).clear()
        for part in (self.engine, self.optimizer, getattr(self.optimizer, "parameter_offload", None)):
            if part is not None:
                _forget_groups(vars(part))


@contextlib.contextmanager
def _linear(function: Callable[..., Tensor] | None = None) -> Iterator[dict[str, Any]]:
    """`torch.nn.functional` with this `linear` for a while; afterwards it has the one from before.

    DeepSpeed's stage 3 puts a function of its own there for the rest of the process, which other steps must not meet.
    """
    names = vars(nn.functional)
    before = names["linear"]
    names["linear"] = function or before
    try:
        yield names
    finally:
        names["linear"] = before


def _forget_groups(attributes: dict[str, Any]) -> None:
    """Take process groups out of an object: hooks of DeepSpeed's that cannot be taken back refer to its engine."""
    for name, value in attributes.items():
        held = value if isinstance(value, list | tuple) else [value]
        if any(issubclass(type(each), dist.ProcessGroup) for each in held):
            attributes[name] = None


def _made_real(apply: Apply, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> nn.Module:
    """The model with params of its own, and with buffers that stand in for those of each call, frozen params too.

    A param without dims, which the engine cannot take, has one.
    """
    net = skeleton_of(apply.train().module)
    made = {name: nn.Parameter(p.detach().clone().view(p.shape or 1)) for name, p in params.items()}
    frozen: list[tuple[nn.Module, str, Tensor]] = []
    tables = {id(table): sub for sub in net.modules() for table in (sub._parameters, sub._buffers)}
    for table, key, name in param_slots(net):
        if name in made:
            table[key] = made[name]
        elif table is tables[id(table)]._parameters:
            frozen.append((tables[id(table)], key, buffers[name].detach()))
        else:
            table[key] = buffers[name].detach().clone()
    for sub, key, tensor in frozen:
        del sub._parameters[key]
        sub.register_buffer(key, tensor, persistent=False)
    return net


def missing() -> list[str]:
    """What DeepSpeed misses on this machine, in words; nothing where it is not installed.

    >>> all(isinstance(each, str) for each in missing())
    True
    """
    if version_of("deepspeed") is None:
        return []
    found = []
    if importlib.util.find_spec("ninja") is None:
        found.append("ninja, with which it compiles its own kernels: pip install ninja")
    if torch.cuda.is_available() and "CUDA_HOME" not in os.environ and not os.path.isdir("/usr/local/cuda"):
        found.append("the CUDA toolkit (nvcc) for its own kernels: install it, and set CUDA_HOME")
    return found + [
        f"a build of its kernels that was cut off, for which others wait: rm {lock}" for lock in stale_locks()
    ]


def stale_locks() -> list[Path]:
    """Locks of builds of kernels that nobody is at any more, for which every later build waits without end.

    A process that builds holds its lock open; one that is killed leaves the file. Where the system does not say what a
    process holds open, a lock is stale once it is older than any build takes.
    """
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(given or user_cache_dir(appname="torch_extensions"))
    locks = sorted(root.glob("**/lock"))
    held = _open_files() if locks else None
    return [lock for lock in locks if _is_stale(lock, held)]


def _is_stale(lock: Path, held: set[tuple[int, int]] | None) -> bool:
    try:
        found = lock.stat()
    except FileNotFoundError:  # the build has come to its end
        return False
    if held is not None and found.st_uid == os.getuid():
        return (found.st_dev, found.st_ino) not in held
    return time.time() - found.st_mtime > _BUILD


def _open_files() -> set[tuple[int, int]] | None:
    """What this user's processes hold open; None where the system does not say."""
    found = set()
    for table in Path("/proc").glob("[0-9]*/fd"):
        try:
            for each in table.iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed in the meantime
                    held = each.stat()
                    found.add((held.st_dev, held.st_ino))
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended in the meantime, or another user's
            continue
    return found or None
