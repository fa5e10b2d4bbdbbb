"""The JSON that a run writes, and its table."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "optree", "torchao", "torchmetrics", "hypothesis", "pytest", "pytest-timeout")
FAILURES = ("failed", "not run")


def machine(device: str) -> dict[str, Any]:
    """The device, and the versions of what is installed; None for what is missing."""
    import torch

    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": "CPU (dry run)",
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in PACKAGES},
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["memory"] = properties.total_memory
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["cuda"], found["nccl"] = torch.version.cuda, _nccl()
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nccl() -> str | None:
    import torch

    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except Exception:
        return None


def has_failed(results: list[dict[str, Any]]) -> bool:
    """Whether a check failed, or was not reached."""
    return any(result["status"] in FAILURES for result in results)


def summary(results: list[dict[str, Any]]) -> str:
    """How many checks had which result, on one line."""
    counts = Counter(result["status"] for result in results)
    return ", ".join(f"{count} {status}" for status, count in counts.most_common())


def line(result: dict[str, Any]) -> str:
    """One result on one line."""
    return f"{result['status']:12} {result.get('seconds', 0):6.1f} s  {result['group']}: {result['name']}" + (
        f"  ({_said(result)})" if _said(result) else ""
    )


def markdown(report: dict[str, Any]) -> str:
    """The results as a table, below a line that names the machine."""
    about = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    rows = [
        f"| {result['group']} | {_cell(result['name'])} | {result['status']} | {result.get('seconds', 0):.1f} |"
        f" {_cell(_said(result))} |"
        for result in report["checks"]
    ]
    return "\n".join([
        f"{about['device']}, {about['date']}, Python {about['python']}, {versions}.",
        f"{summary(report['checks'])}; {report['seconds']:.0f} s.",
        "",
        "| group | check | result | s | figures, or why not |",
        "| --- | --- | --- | ---: | --- |",
        *rows,
        "",
    ])  # fmt: skip


def _said(result: dict[str, Any]) -> str:
    figures = ", ".join(f"{name} {_number(value)}" for name, value in result.get("figures", {}).items())
    return result.get("message") or figures


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write(report: dict[str, Any], directory: Path) -> None:
    """Write `gpu.json` and `gpu.md` into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "gpu.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    (directory / "gpu.md").write_text(markdown(report))
