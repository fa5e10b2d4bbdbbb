"""What `lumen hang` says of the ranks' collectives: which rank is behind, or does something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumen.cli.main import main
from lumen.core import _torch_compat
from lumen.parallel.comm.hang_dump import HangDump, collectives, compare


def dump(rank: int, size: int, groups: dict[str, list[str]], start: int = 1) -> dict[str, Any]:
    """What a rank with these collectives writes, of which the recorder still has those from `start` on."""
    made = [
        {"group": group, "number": n, "operation": name, "shapes": [[4]], "dtypes": ["Float"], "state": "ended"}
        for group, names in groups.items()
        for n, name in enumerate(names, 1)
        if n >= start
    ]
    return {"rank": rank, "size": size, "step": 6, "host": "a", "time": 1e9 * (rank < 7), "collectives": made}


@settings(max_examples=40)
@given(st.data())
def test_the_first_difference_is_named(data: st.DataObject) -> None:
    """Whatever the ranks have done together, and however little of it their recorders have kept."""
    size, common = data.draw(st.integers(2, 4)), data.draw(st.lists(st.sampled_from("abc"), max_size=6))
    late = data.draw(st.integers(0, size - 1))
    starts = [data.draw(st.integers(1, len(common) + 1)) for _ in range(size)]
    dumps = [
        dump(rank, size, {"0": [*common, *([] if rank == late else ["sum", "sum"])]}, starts[rank])
        for rank in range(size)
    ]
    lines = compare(dumps)
    if not dumps[late]["collectives"]:
        assert len(lines) <= 1  # nothing is known of what the late rank has done
        return
    others = ", ".join(str(rank) for rank in range(size) if rank != late)
    word, has = ("ranks", "have") if size > 2 else ("rank", "has")
    number = len(common) + 1
    assert lines == [
        f"group 0: rank {late} has not begun collective {number}, sum [4] Float, which {word} {others} {has} begun"
    ]


def test_one_that_does_something_else_and_one_that_wrote_nothing() -> None:
    dumps = [dump(0, 4, {"0": ["sum", "max"], "1": ["sum"]}), dump(1, 4, {"0": ["sum", "sum"], "1": ["sum"]})]
    dumps.append(dump(3, 4, {"0": ["sum", "sum"]}))
    assert compare(dumps) == [
        "rank 2 wrote nothing: dead, frozen, or on another file system",
        "group 0: collective 2 is max [4] Float on rank 0, but sum [4] Float on ranks 1, 3",
    ]
    assert compare([dump(rank, 2, {"0": ["sum"]}) for rank in (0, 1)]) == []


def test_the_command_and_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hang", str(tmp_path)]) == 1
    assert "no rank of this run has hung" in capsys.readouterr().err
    (tmp_path / "hang").mkdir()
    for rank, names in {0: ["sum", "max"], 1: ["sum"], 7: []}.items():  # the last from an earlier hang
        (tmp_path / "hang" / f"rank-{rank}.json").write_text(json.dumps(dump(rank, 2, {"0": names})))
    assert main(["hang", str(tmp_path)]) == main(["hang", str(tmp_path / "hang")]) == 0
    said = capsys.readouterr().out
    assert "rank 0, on a: step 6; last collective 2, max, ended" in said
    assert "rank 1 has not begun collective 2, max [4] Float, which rank 0 has begun" in said
    (tmp_path / "hang" / "rank-0.json").write_text(json.dumps(dump(0, 2, {"0": ["sum"]})))
    assert main(["hang", str(tmp_path)]) == 1
    assert "all ranks have begun the same collectives" in capsys.readouterr().out


def test_it_is_written_once_and_never_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = HangDump(tmp_path, 1, 2)
    written.write(6)
    report = json.loads((tmp_path / "hang" / "rank-1.json").read_text())
    assert (report["rank"], report["size"], report["step"]) == (1, 2, 6)
    assert "test_it_is_written_once" in (tmp_path / "hang" / "rank-1.txt").read_text()
    (tmp_path / "hang" / "rank-1.json").unlink()
    written.write(7)
    assert not (tmp_path / "hang" / "rank-1.json").exists()
    (tmp_path / "file").write_text("")
    HangDump(tmp_path / "file", 0, 2).write(6)
    assert "[rank 0] its state could not be written to" in capsys.readouterr().err


def test_nccl_has_a_recorder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(library: str, time: int, **fields: Any) -> dict[str, Any]:
        return {"profiling_name": f"{library}:sum", "time_created_ns": time, "process_group": ["0", "data"], **fields}

    recorders = {
        "dump_fr_trace_json": [entry("gloo", 1, state="scheduled", retired=True), entry("gloo", 3, is_p2p=True)],
        "dump_nccl_trace": [entry("nccl", 2, state="started", retired=False)],
    }
    for name, entries in recorders.items():
        monkeypatch.setitem(_torch_compat.__dict__, name, lambda entries=entries: json.dumps({"entries": entries}))
    assert [(each["group"], each["operation"], each["state"]) for each in collectives()] == [
        ("0 data", "sum", "ended"),
        ("0 data", "sum", "started"),
    ]
