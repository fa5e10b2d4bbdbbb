"""Params for TensorBoard's projector: tables of text beside the event files, and a list of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lumen.errors import SinkError, ValueKindError
from lumen.optim._param_names import matching

_LIST = "projector_config.pbtxt"


def chosen(names: Sequence[str], params: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The params to show, by names and patterns of them.

    Raises `PatternError` for a name that no param has, `ValueKindError` for what is no matrix, and `SinkError` where
    this process does not hold the params.
    """
    if params is None:
        raise SinkError(
            f"TensorBoard(…, embeddings={tuple(names)!r}) shows whole params, and this run has none in one process:"
            " they are spread, as by lm.fsdp, or the state has no `params`. Leave embeddings out, and log a matrix of"
            " result.export() with TensorBoard(…).take_params(step, {name: matrix}, last=True)."
        )
    found = {
        name: params[name]
        for pattern in names
        for name, is_it in zip(params, matching(pattern, tuple(params)), strict=True)
        if is_it
    }
    for name, value in found.items():
        if value.dim() < 2:
            raise ValueKindError(
                f"the param {name!r} has the shape {list(value.shape)}; the projector shows the rows of matrices,"
                " [N, D] or [N, …]: leave it out of embeddings."
            )
    return found


def write(logdir: Path, step: int, tag: str, value: Tensor) -> None:
    """The rows of a matrix [N, D], or [N, …], as points of the projector, in place of earlier ones of that step."""
    # What lies under SummaryWriter.add_embedding, which would open an event file besides.
    from tensorboardX.embedding import append_pbtxt, make_mat

    place = f"{step:05}/{tag}"
    (logdir / place).mkdir(parents=True, exist_ok=True)
    make_mat(value.detach().flatten(1).float().cpu().numpy(), str(logdir / place))
    listed = logdir / _LIST
    # A run that goes on from a checkpoint comes to the same step again.
    if not listed.exists() or f'"{tag}:{step:05}"' not in listed.read_text(encoding="utf-8"):
        append_pbtxt(None, None, str(logdir), place, step, tag)
