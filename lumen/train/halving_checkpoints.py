"""`HalvingCheckpoints`: a search on disk after each group of lanes, from which a killed one continues."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from lumen.checkpoint import Store, json_tree, rng
from lumen.core.urls import join, path_or_url
from lumen.data import Cursor
from lumen.errors import CheckpointError


@dataclass
class SearchState:
    """How far a search is: in which `rung`, and the metrics so far of each rung's trials by their numbers.

    `waiting` has the states of the trials that have not run in this rung, except in rung 0, where they have none yet.
    `best` has those of the best that have. The batches of the rung are those from `begin`; it ends at `end`.
    """

    rung: int = 0
    metrics: list[dict[int, float]] = field(default_factory=lambda: [{}])
    waiting: dict[int, Any] = field(default_factory=dict)
    best: dict[int, Any] = field(default_factory=dict)
    begin: Cursor = field(default_factory=Cursor)
    end: Cursor = field(default_factory=Cursor)


class HalvingCheckpoints:
    """Saves a search in `directory/checkpoints`; without a directory it does nothing.

    `settings` decide how the search goes. A search resumes only with the same ones.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, resume: str, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)
        self._resumes = resume == "auto"
        self._store: Store | None = None
        if directory is not None:
            root = path_or_url(directory, "the directory of a search")
            self._store = Store(join(root, "checkpoints"))
        elif self._resumes:
            raise CheckpointError(
                'resume="auto" needs the directory of the search: write directory="runs/search", also the first time.'
            )

    def open(self) -> AbstractContextManager[Any]:
        """A context in which the store is open."""
        if self._store is None:
            return nullcontext()
        newest = self._store.latest()
        if newest is not None and not self._resumes:
            raise CheckpointError(
                f"{self._store.directory} holds the checkpoint of a search, and a new one would replace it. To resume"
                ' that search, write resume="auto"; to start over, choose another directory or remove that one.'
            )
        return self._store.open()

    def load(self, start: Callable[[int], Any]) -> SearchState:
        """The search as it was saved last, or a new one; `start` gives the state with which a trial begins."""
        newest = None if self._store is None else self._store.latest()
        if self._store is None or newest is None:
            return SearchState()
        meta = self._store.metadata(newest)["meta"]
        self._check(meta["settings"])
        like = {name: {str(number): start(number) for number in meta[name]} for name in ("waiting", "best")}
        states = self._store.restore(newest, like)
        rng.restore(self._store.load(newest, item="extra")["rng"])
        return SearchState(
            rung=meta["rung"],
            metrics=[{int(number): float(value) for number, value in rung.items()} for rung in meta["metrics"]],
            waiting={int(number): state for number, state in states["waiting"].items()},
            best={int(number): state for number, state in states["best"].items()},
            begin=Cursor(*meta["begin"]),
            end=Cursor(*meta["end"]),
        )

    def save(self, search: SearchState) -> None:
        """Save the search; returns when it is copied."""
        if self._store is None:
            return
        states = {name: {str(n): state for n, state in getattr(search, name).items()} for name in ("waiting", "best")}
        meta = {
            "settings": self._settings,
            "rung": search.rung,
            "metrics": [{str(n): json_tree.number(v) for n, v in rung.items()} for rung in search.metrics],
            "waiting": list(search.waiting),
            "best": list(search.best),
            "begin": list(search.begin),
            "end": list(search.end),
        }
        trained = sum(map(len, search.metrics))  # grows with each save
        self._store.save(trained, states, extra={"rng": rng.capture()}, meta=meta)

    def _check(self, saved: Mapping[str, Any]) -> None:
        different = [name for name, value in self._settings.items() if saved.get(name) != value]
        if different:
            name = different[0]
            raise CheckpointError(
                f"the search in this directory has {name} {saved.get(name)!r:.200}, and this one"
                f" {self._settings[name]!r:.200}. A search resumes with the same settings; start another one in a"
                " directory of its own."
            )
