"""Object stores for tests, each in the place of `memory://`: one that fails where a test says, one on a disk."""

from __future__ import annotations

import contextlib
import os

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

OPERATIONS = ("cat_file", "pipe_file", "put_file", "get_file", "rm_file", "find", "cp_file")


class FaultyFileSystem(MemoryFileSystem):
    """In memory. Before each operation `before` is called with its name, and after it `after`: both may raise."""

    store = {}
    pseudo_dirs = [""]
    before = after = staticmethod(lambda operation: None)

    @classmethod
    def heal(cls):
        cls.before = cls.after = staticmethod(lambda operation: None)

    @classmethod
    def fail(cls, before=None, after=None):
        nothing = lambda operation: None  # noqa: E731
        cls.before, cls.after = staticmethod(before or nothing), staticmethod(after or nothing)


def _guarded(operation):
    def run(self, *args, **kwargs):
        self.before(operation)
        result = getattr(MemoryFileSystem, operation)(self, *args, **kwargs)
        self.after(operation)
        return result

    return run


for _operation in OPERATIONS:
    setattr(FaultyFileSystem, _operation, _guarded(_operation))


class SharedFileSystem(LocalFileSystem):
    """In the directory that the environment names, for several processes."""

    def __init__(self, **kwargs):
        super().__init__(auto_mkdir=True, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("memory://", os.environ["LUMEN_TEST_OBJECTS"] + "/"))


@contextlib.contextmanager
def installed(implementation):
    """`memory://` is this file system, and empty."""
    previous = fsspec.get_filesystem_class("memory")
    if implementation is FaultyFileSystem:
        implementation.store, implementation.pseudo_dirs = {}, [""]
        implementation.heal()
    fsspec.register_implementation("memory", implementation, clobber=True)
    try:
        yield implementation
    finally:
        fsspec.register_implementation("memory", previous, clobber=True)
