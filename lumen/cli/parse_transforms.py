"""Parse transforms from the text that a dump names them by.

A dump is untrusted: nothing in it is executed. Names are looked up among Lumen's own transforms, arguments must be
literals, and compiler options, some of which are commands, are rejected.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from lumen.core.step import Transform
from lumen.errors import LumenError, StepError
from lumen.transforms._accumulate import accumulate
from lumen.transforms._chunked_logits import chunked_logits
from lumen.transforms._clip import clip
from lumen.transforms._compile import compile as compiled
from lumen.transforms._donate import donate
from lumen.transforms._dp_sgd import dp_sgd
from lumen.transforms._ema import ema
from lumen.transforms._ensemble import ensemble, sweep
from lumen.transforms._guard import guard
from lumen.transforms._precision import precision
from lumen.transforms._quantized_matmul import quantized_matmul
from lumen.transforms._remat import remat
from lumen.transforms._sam import sam
from lumen.transforms._seeded import seeded
from lumen.transforms._unroll import unroll

_TRANSFORMS: dict[str, type[Transform]] = {
    kind.__name__: kind
    for kind in (
        accumulate,
        chunked_logits,
        clip,
        compiled,
        donate,
        dp_sgd,
        ema,
        ensemble,
        guard,
        precision,
        quantized_matmul,
        remat,
        sam,
        seeded,
        sweep,
        unroll,
    )
}


def parse(texts: Sequence[str]) -> list[Transform]:
    """Build the transforms whose `repr` is each of `texts`.

    Raises `StepError` if the text does not determine a transform.

    >>> parse(["lm.guard('dump')", "lm.precision('bf16')"])
    [lm.guard('dump'), lm.precision('bf16')]
    """
    return [_parse_transform(text) for text in texts]


def _parse_transform(text: str) -> Transform:
    try:
        kind, args, kwargs = parse_call(text, _TRANSFORMS)
        transform: Transform = kind(*args, **kwargs)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, LumenError) as error:
        raise StepError(
            f"the step ran under {text}, which cannot be rebuilt from the dump alone. Let the function passed to --run"
            " return the step with its transforms: return lm.compose(...)(step), state"
        ) from error
    if repr(transform) != text:
        raise StepError(
            f"the step ran under {text}, which reads as {transform!r}: return the step with its transforms."
        )
    return transform


def parse_call(text: str, allowed: Mapping[str, type[Transform]]) -> tuple[type[Any], list[Any], dict[str, Any]]:
    """The transform class that `text` names, and its literal arguments; otherwise ValueError or SyntaxError."""
    match ast.parse(text, mode="eval").body:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="lm"), attr=name), args=args, keywords=keywords):
            kwargs = {str(node.arg): ast.literal_eval(node.value) for node in keywords}
            if name not in allowed or (name == "compile" and "options" in kwargs):
                raise ValueError(name)
            return allowed[name], [ast.literal_eval(node) for node in args], kwargs
    raise ValueError(text)
