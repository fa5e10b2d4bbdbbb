"""Transforms from the text in which a dump names them.

A dump may come from a stranger: nothing in it is run. A name is looked up among Lumen's own transforms, arguments are
literals, and options of the compiler, some of which are commands, are not taken from it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from lumen.core.step import Transform
from lumen.errors import LumenError, StepError
from lumen.transforms._accumulate import accumulate
from lumen.transforms._clip import clip
from lumen.transforms._compile import compile as compiled
from lumen.transforms._donate import donate
from lumen.transforms._dp_sgd import dp_sgd
from lumen.transforms._ema import ema
from lumen.transforms._ensemble import ensemble
from lumen.transforms._guard import guard
from lumen.transforms._precision import precision
from lumen.transforms._quantized_matmul import quantized_matmul
from lumen.transforms._remat import remat
from lumen.transforms._seeded import seeded
from lumen.transforms._unroll import unroll

_KNOWN: dict[str, type[Transform]] = {
    kind.__name__: kind
    for kind in (
        accumulate,
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
        seeded,
        unroll,
    )
}


def transforms(texts: Sequence[str]) -> list[Transform]:
    """The transforms that read so.

    Raises `StepError` where that cannot be known from the text.

    >>> transforms(["lm.guard('dump')", "lm.precision('bf16')"])
    [lm.guard('dump'), lm.precision('bf16')]
    """
    return [_transform(text) for text in texts]


def _transform(text: str) -> Transform:
    try:
        kind, args, kwargs = parsed(text, _KNOWN)
        made: Transform = kind(*args, **kwargs)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, LumenError) as error:
        raise StepError(
            f"the step ran under {text}, which cannot be made from the dump alone. Let the function given to --run"
            " return the step with its transforms: return lm.compose(...)(step), state"
        ) from error
    if repr(made) != text:
        raise StepError(f"the step ran under {text}, which reads as {made!r}: return the step with its transforms.")
    return made


def parsed(text: str, known: Mapping[str, type[Transform]]) -> tuple[type[Any], list[Any], dict[str, Any]]:
    """The transform that `text` names, and its arguments, which are literals; ValueError or SyntaxError where not."""
    match ast.parse(text, mode="eval").body:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="lm"), attr=name), args=args, keywords=keywords):
            kwargs = {str(each.arg): ast.literal_eval(each.value) for each in keywords}
            if name not in known or (name == "compile" and "options" in kwargs):
                raise ValueError(name)
            return known[name], [ast.literal_eval(each) for each in args], kwargs
    raise ValueError(text)
