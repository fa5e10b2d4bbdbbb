"""Params for TensorBoard's projector: text tables next to the event files, and an index of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lumen.errors import SinkError, ValueKindError
from lumen.optim._param_names import matching

_INDEX_FILE = "projector_config.pbtxt"


def select_params(names: Sequence[str], params: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Select the params that match the names and patterns.

    Raises `PatternError` for a pattern without a match, `ValueKindError` for a param that is not a matrix, and
    `SinkError` if this process does not have the full params.
    """
    if params is None:
        raise SinkError(
            f"TensorBoard(…, embeddings={tuple(names)!r}) needs full params, which no process of this run has:"
            " they are sharded, as by lm.fsdp, or the state has no `params`. Omit embeddings, and log a matrix of"
            " result.export() with TensorBoard(…).take_params(step, {name: matrix}, last=True)."
        )
    selected = {
        name: params[name]
        for pattern in names
        for name, is_match in zip(params, matching(pattern, tuple(params)), strict=True)
        if is_match
    }
    for name, param in selected.items():
        if param.dim() < 2:
            raise ValueKindError(
                f"the param {name!r} has the shape {list(param.shape)}; the projector shows the rows of matrices,"
                " [N, D] or [N, …]: remove it from embeddings."
            )
    return selected


def write(logdir: Path, step: int, tag: str, value: Tensor) -> None:
    """Write the rows of a matrix [N, D] or [N, …] as points of the projector, replacing those of the same step."""
    # SummaryWriter.add_embedding calls these functions, but also opens an event file.
    from tensorboardX.embedding import append_pbtxt, make_mat

    subdirectory = f"{step:05}/{tag}"
    (logdir / subdirectory).mkdir(parents=True, exist_ok=True)
    make_mat(value.detach().flatten(1).float().cpu().numpy(), str(logdir / subdirectory))
    index_file = logdir / _INDEX_FILE
    # A resumed run reaches the same step again.
    if not index_file.exists() or f'"{tag}:{step:05}"' not in index_file.read_text(encoding="utf-8"):
        append_pbtxt(None, None, str(logdir), subdirectory, step, tag)
