"""WebDataset's pipelines: the epoch of their deterministic shuffles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_PIPELINE = "webdataset.pipeline", "DataPipeline"
_SHUFFLE = "webdataset.filters", "detshuffle"


class ShuffleEpoch:
    """Sets the epoch of a `detshuffle`, which otherwise counts its passes: from 0 in each new process and worker."""

    def __init__(self, stage: Any) -> None:
        self._stage = stage

    def set_epoch(self, number: int) -> None:
        """The next pass is epoch `number`; it adds 1 as it begins."""
        self._stage.epoch = number - 1


def shuffle_epochs(data: Any) -> Iterable[ShuffleEpoch]:
    """Those of the shuffles of a pipeline; none of what is no pipeline. WebDataset is not imported.

    >>> list(shuffle_epochs([1, 2]))
    []
    """
    if not _is_a(data, _PIPELINE):
        return
    for stage in data.pipeline:
        if _is_a(stage, _SHUFFLE):
            yield ShuffleEpoch(stage)


def _is_a(value: Any, kind: tuple[str, str]) -> bool:
    return any((base.__module__, base.__name__) == kind for base in type(value).__mro__)
