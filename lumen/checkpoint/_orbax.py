"""The only module that imports Orbax and JAX.

Orbax asks JAX for the number of processes, which makes JAX initialize its devices, and on a GPU JAX reserves three
quarters of the memory. So unless JAX was imported before or JAX_PLATFORMS is set, it is initialized on the CPU only,
and `jax.config` is then restored. One limitation remains: JAX initializes its devices once per process, so a program
that uses JAX on a GPU itself must import and use it before its first checkpoint.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

loaded_here = False  # JAX was first imported by this module
_importing = threading.Lock()
_saving = threading.Lock()


def load() -> ModuleType:
    """`orbax.checkpoint`, imported on the first call; that takes about a second."""
    with _importing:
        return _load()


@cache
def _load() -> ModuleType:
    global loaded_here
    loaded_here = "jax" not in sys.modules
    if loaded_here and "JAX_PLATFORMS" not in os.environ:
        _start_on_cpu()
    import orbax.checkpoint as ocp

    return ocp  # type: ignore[no-any-return]


def _start_on_cpu() -> None:
    import jax

    config: Any = jax.config  # its options are defined at run time
    before = config.jax_platforms
    config.update("jax_platforms", "cpu")
    try:
        jax.devices()
    finally:
        config.update("jax_platforms", before)


def write(directory: Path, arrays: Mapping[tuple[str, tuple[str, ...]], np.ndarray[Any, Any]]) -> None:
    """Write a composite checkpoint: each item's arrays as a nested dict, and the item `meta`, an empty object.

    Errors of Orbax are raised without their traceback, which is hundreds of lines of threads and event loops.
    """
    ocp = load()
    items: dict[str, Any] = {"meta": ocp.args.JsonSave({})}
    # An item without arrays is left out: Orbax does not accept an empty tree.
    items |= {item: ocp.args.PyTreeSave(nested) for item, nested in _nested(arrays).items()}
    # Orbax numbers the saves of a process, and two concurrent ones confuse each other's signals of new directories.
    with _saving, _quiet():
        handlers = {item: ocp.JsonCheckpointHandler() if item == "meta" else _tree_handler(ocp) for item in items}
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
                checkpointer.save(directory.absolute(), args=ocp.args.Composite(**items))
        except Exception as error:
            error.__cause__ = error.__context__ = None
            raise error.with_traceback(None) from None


def _tree_handler(ocp: ModuleType) -> Any:
    """A handler that writes one plain file for each array, without copying it first: the snapshot does not change."""
    types = ocp.type_handlers
    numpy = types.NumpyHandler(deepcopy_host_arrays=False)
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=True,
        use_compression=False,
        type_handler_registry=types.create_type_handler_registry((np.ndarray, numpy)),
    )


def _nested(arrays: Mapping[tuple[str, tuple[str, ...]], Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for (item, keys), value in arrays.items():
        node = result.setdefault(item, {})
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what Orbax logs inside, in any thread, such as that there is no OCDBT checkpoint to merge.

    Errors that it logs are logged at the end if it raises none; otherwise they only repeat what it raises.
    """
    errors: list[logging.LogRecord] = []

    def audible(record: logging.LogRecord) -> bool:
        if "orbax" not in record.pathname:
            return True
        if record.levelno >= logging.ERROR:
            errors.append(record)
        return False

    logger = logging.getLogger("absl")
    logger.addFilter(audible)
    before = sys.unraisablehook
    sys.unraisablehook = ours = _without_late_writes(before)
    try:
        yield
        if sys.unraisablehook is ours:  # after an error the hook stays, because some writes end later
            sys.unraisablehook = before
    finally:
        logger.removeFilter(audible)
    for record in errors:
        logger.handle(record)


Hook = Callable[[Any], object]  # of `sys.unraisablehook`


def _without_late_writes(hook: Hook) -> Hook:
    """`hook` without TensorStore's error for each write that ends after Orbax has closed its loop on a failure."""
    if getattr(hook, "of_orbax", False):
        return hook

    def run(unraisable: Any) -> None:
        late = unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"
        trace = unraisable.exc_traceback
        # The error belongs to no object, and TensorStore's thread has no Python frame around the call.
        if (
            not late
            or unraisable.object is not None
            or trace.tb_frame.f_globals.get("__name__") != "asyncio.base_events"
        ):
            hook(unraisable)

    run.of_orbax = True  # type: ignore[attr-defined]
    return run
