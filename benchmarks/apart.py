"""A call in a fresh process, so that one measurement does not affect the next."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

T = TypeVar("T")


class ApartError(RuntimeError):
    """The call raised, or its process died."""


def apart(call: Callable[..., T], *args: Any, environment: Mapping[str, str] | None = None) -> T:
    """The result of `call(*args)` in a fresh process, which has `environment` in addition to this one's."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    with _added(environment or {}):
        process = context.Process(target=_answer, args=(writer, call, args))
        process.start()
    writer.close()
    try:
        wait([reader, process.sentinel])
        if not reader.poll():
            process.join()
            raise ApartError(f"its process ended with exit code {process.exitcode}")
        fine, found = reader.recv()
        process.join()
    except EOFError:
        process.join()
        raise ApartError(f"its process ended with exit code {process.exitcode}") from None
    finally:
        if process.is_alive():
            process.terminate()
            process.join()
    if not fine:
        raise ApartError(found)
    return found


def _answer(writer: Connection, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        writer.send((True, call(*args)))
    except Exception as error:
        if os.environ.get("BENCH_TRACEBACK"):
            traceback.print_exc()
        writer.send((False, f"{type(error).__name__}: {error}".splitlines()[0][:200]))


@contextmanager
def _added(values: Mapping[str, str]) -> Any:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
