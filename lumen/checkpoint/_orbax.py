"""The one place that imports Orbax and JAX.

Orbax asks JAX for the number of processes, which makes JAX look for devices, and on a GPU JAX takes three quarters of
the memory for itself. So where nobody has imported JAX before us or set JAX_PLATFORMS, it starts on the CPU alone;
the environment and `jax.config` are then as they were. What remains: JAX looks for devices once in a process, so a
program that uses JAX on a GPU itself must import it, and use it, before its first checkpoint.
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

    config: Any = jax.config  # its options come at run time
    before = config.jax_platforms
    config.update("jax_platforms", "cpu")
    try:
        jax.devices()
    finally:
        config.update("jax_platforms", before)


def write(directory: Path, arrays: Mapping[tuple[str, tuple[str, ...]], np.ndarray[Any, Any]]) -> None:
    """Write a composite checkpoint: each item's arrays as a nested dict, and the item `meta`, an empty object.

    What Orbax raises comes without the way it took through Orbax's threads and event loops: that is hundreds of lines.
    """
    ocp = load()
    items: dict[str, Any] = {"meta": ocp.args.JsonSave({})}
    # One without arrays is left out: Orbax takes no empty tree.
    items |= {item: ocp.args.PyTreeSave(nested) for item, nested in _nested(arrays).items()}
    # Orbax numbers the saves of a process, and two at once take each other's signals that a directory is there.
    with _saving, _quiet():
        handlers = {item: ocp.JsonCheckpointHandler() if item == "meta" else _tree_handler(ocp) for item in items}
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
                checkpointer.save(directory.absolute(), args=ocp.args.Composite(**items))
        except Exception as error:
            error.__cause__ = error.__context__ = None
            raise error.with_traceback(None) from None


def _tree_handler(ocp: ModuleType) -> Any:
    """One plain file for each array, which Orbax does not copy first: nobody changes it."""
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
    """Without what Orbax logs meanwhile, in whichever thread: that there is no OCDBT checkpoint to merge, say.

    The errors that it logs are said where it raises nothing; else they are what it raises, over and over.
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
        if sys.unraisablehook is ours:  # after an error it stays: some writes end later
            sys.unraisablehook = before
    finally:
        logger.removeFilter(audible)
    for record in errors:
        logger.handle(record)


Hook = Callable[[Any], object]  # of `sys.unraisablehook`


def _without_late_writes(hook: Hook) -> Hook:
    """`hook` without what TensorStore says of each write that ends after Orbax, where another failed, has gone."""
    if getattr(hook, "of_orbax", False):
        return hook

    def run(said: Any) -> None:
        late = said.exc_type is RuntimeError and str(said.exc_value) == "Event loop is closed"
        trace = said.exc_traceback
        # It comes of no object, and in a thread of TensorStore's own nothing of Python lies around the call.
        if not late or said.object is not None or trace.tb_frame.f_globals.get("__name__") != "asyncio.base_events":
            hook(said)

    run.of_orbax = True  # type: ignore[attr-defined]
    return run
