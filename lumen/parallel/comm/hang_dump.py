"""What each rank writes when one of them hangs, its last collectives and its stacks, and how the ranks differ in them.

The collectives are those of torch's flight recorder, which keeps the last 2,000 (`TORCH_FR_BUFFER_SIZE`) of each
process. It numbers them in each group, so the same number on two ranks is the same collective.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lumen.core import _torch_compat
from lumen.errors import CheckpointError

DIRECTORY = "hang"


_PATIENCE = 10.0  # seconds; the file system may be what hangs
_SAME_HANG = 600.0  # seconds between two ranks' files; older ones are those of an earlier hang


class HangDump:
    """Writes `rank-R.json`, with the collectives, and `rank-R.txt`, with the stacks of all threads, once."""

    def __init__(self, run_directory: Path, rank: int, size: int) -> None:
        self.directory = run_directory / DIRECTORY
        self._rank, self._size = rank, size
        self._is_written = False

    @property
    def advice(self) -> str:
        """Where to look, for the end of an error."""
        run = self.directory.parent
        return (
            f" Each rank wrote its stacks and last collectives to {self.directory}; to compare them: lumen hang {run}"
        )

    def write(self, step: int) -> None:
        """Write both files, for a rank that has begun `step`; a failure is reported on stderr alone.

        A thread does it, for which this waits a few seconds.
        """
        if not self._is_written:
            self._is_written = True
            thread = threading.Thread(target=self._write, args=(step,), name="lumen hang", daemon=True)
            thread.start()
            thread.join(_PATIENCE)

    def _write(self, step: int) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            stem = self.directory / f"rank-{self._rank}"
            with stem.with_suffix(".txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            report = {
                "rank": self._rank,
                "size": self._size,
                "step": step,
                "time": time.time(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "collectives": collectives(),
            }
            stem.with_suffix(".json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        except Exception as error:  # the hang is what is to be reported
            sys.stderr.write(f"[rank {self._rank}] its state could not be written to {self.directory}: {error}\n")


def collectives() -> list[dict[str, Any]]:
    """The last collectives of this process, the oldest first, as torch's flight recorder has them."""
    dumps = [_torch_compat.dump_nccl_trace, _torch_compat.dump_fr_trace_json]  # NCCL's are in a recorder of their own
    entries = [entry for dump in dumps if dump is not None for entry in json.loads(dump()).get("entries", ())]
    entries.sort(key=lambda entry: int(entry.get("time_created_ns", 0)))
    return [_brief(entry) for entry in entries if not entry.get("is_p2p")]


def _brief(entry: Mapping[str, Any]) -> dict[str, Any]:
    has_ended = entry.get("retired") and entry.get("state") != "completed"  # Gloo's never say that they completed
    return {
        "group": " ".join(filter(None, entry.get("process_group", ()))),
        "number": entry.get("collective_seq_id"),
        "operation": str(entry.get("profiling_name", "")).rpartition(":")[2],
        "shapes": entry.get("input_sizes"),
        "dtypes": entry.get("input_dtypes"),
        "state": "ended" if has_ended else entry.get("state"),
    }


def read_dumps(run_directory: Path) -> list[dict[str, Any]]:
    """What the ranks wrote when one hung last, by rank; raises `CheckpointError` if there is nothing."""
    directory = run_directory if run_directory.name == DIRECTORY else run_directory / DIRECTORY
    paths = sorted(directory.glob("rank-*.json"), key=lambda path: int(path.stem.rpartition("-")[2]))
    if not paths:
        raise CheckpointError(
            f"{directory} has no files rank-*.json: no rank of this run has hung, or it has no lm.Checkpointer with a"
            " local directory."
        )
    dumps = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    newest = max(dump["time"] for dump in dumps)
    return [dump for dump in dumps if dump["time"] > newest - _SAME_HANG]


def compare(dumps: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the ranks' collectives differ, a line for each finding; of each group, the first number that differs.

    >>> def dump(rank, *operations):
    ...     made = [{"group": "0", "number": i, "operation": name} for i, name in enumerate(operations)]
    ...     return {"rank": rank, "size": 2, "step": 7, "collectives": made}
    >>> compare([dump(0, "all_reduce", "all_gather"), dump(1, "all_reduce")])
    ['group 0: rank 1 has not begun collective 1, all_gather, which rank 0 has begun']
    >>> compare([dump(0, "all_reduce"), dump(1, "broadcast")])
    ['group 0: collective 0 is all_reduce on rank 0, but broadcast on rank 1']
    """
    size = dumps[0]["size"]
    absent = sorted(set(range(size)) - {dump["rank"] for dump in dumps})
    lines = [f"{_ranks(absent)} wrote nothing: dead, frozen, or on another file system"] if absent else []
    groups: dict[str, dict[int, dict[int, str]]] = {}  # by group and number, each rank's collective
    for dump in dumps:
        for entry in dump["collectives"]:
            by_number = groups.setdefault(entry["group"], {})
            by_number.setdefault(entry["number"], {})[dump["rank"]] = _described(entry)
    for group, by_number in groups.items():
        members = {rank for by_rank in by_number.values() for rank in by_rank}
        first = {rank: min(n for n, by_rank in by_number.items() if rank in by_rank) for rank in members}
        lines += _first_difference(group, by_number, members, max(first.values(), default=0))
    return lines


def _first_difference(
    group: str, by_number: Mapping[int, Mapping[int, str]], members: set[int], start: int
) -> list[str]:
    """The first collective of a group, from number `start` on, that is not the same on all members."""
    for number in sorted(n for n in by_number if n >= start):
        by_rank = by_number[number]
        behind = sorted(members - by_rank.keys())
        kinds = sorted(set(by_rank.values()))
        if len(kinds) > 1:
            variants = [f"{kind} on {_ranks([r for r, k in sorted(by_rank.items()) if k == kind])}" for kind in kinds]
            return [f"group {group}: collective {number} is {', but '.join(variants)}"]
        if behind:
            begun, verb = _ranks(sorted(by_rank)), "has" if len(behind) == 1 else "have"
            has = "has" if len(by_rank) == 1 else "have"
            return [
                f"group {group}: {_ranks(behind)} {verb} not begun collective {number}, {kinds[0]}, which {begun} {has}"
                " begun"
            ]
    return []


def _described(entry: Mapping[str, Any]) -> str:
    shapes = ", ".join(map(str, entry.get("shapes") or ()))
    dtypes = ", ".join(dict.fromkeys(entry.get("dtypes") or ()))
    return " ".join(filter(None, (entry["operation"], shapes, dtypes)))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
