"""`lm.chunked_logits`: a language model's cross-entropy without its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lumen.core.annotations import integer_of
from lumen.core.primitives import ApplyCall
from lumen.core.rules import Next
from lumen.core.step import StepFn, Transform
from lumen.errors import HyperparameterError, PatternError
from lumen.losses._lazy_logits import lazy_logits
from lumen.transforms._support.module_patterns import Pattern, select_modules
from lumen.transforms._support.unapplied import with_apply_rule


class chunked_logits(Transform):
    """Compute the cross-entropy of a language model's logits in chunks of tokens, so that they never exist as a whole.

    `pattern` selects the head, an `nn.Linear`: a glob over module names (`"lm_head"`), a module class, or a predicate
    `(name, module) -> bool`. By default it is what `get_output_embeddings()` of a Hugging Face model returns, or else
    the module called `lm_head` or `head`. `chunk` is the number of tokens whose logits exist at a time, by default as
    many as make a chunk about as large as the head's input, at least 128.

    The head then returns logits of which only the shape and dtype are known. `torch.nn.functional.cross_entropy`,
    `nn.CrossEntropyLoss` and `argmax` over the classes read them in chunks, also after casts to wider dtypes, slices
    and reshapes of the tokens, scaling by numbers and soft-capping (`cap * tanh(logits / cap)`): the model may compute
    its own loss, as those of transformers do when they are given labels. Any other function computes all logits, once,
    with an `InexactWarning`: it works, and saves nothing.

    Law: `chunked_logits()(step) == step`, up to the order of sums. `reduction="none"` computes the logits a second time
    in the backward pass; the others compute them once. Under `lm.tensor_parallel` with a head sharded over the
    vocabulary, each rank computes the logits of its own classes only.

    Raises `PatternError` where no module or one that is no `nn.Linear` is selected, and where another transform has
    replaced the head's forward; `HyperparameterError` for a chunk that is no number of tokens. See
    `lm.losses.linear_cross_entropy` for the loss as a function, with a z-loss and weights of tokens.

    >>> import lumen as lm
    >>> lm.chunked_logits("lm_head", chunk=512)
    lm.chunked_logits('lm_head', chunk=512)
    """

    name = "chunked_logits"
    level = "chunked_logits"
    reason = "chunked_logits replaces the output of the model's head"

    def __init__(self, pattern: Pattern | None = None, *, chunk: int | None = None) -> None:
        size = integer_of(chunk, low=1)
        if chunk is not None and size is None:
            raise HyperparameterError(f"chunk={chunk!r} is a number of tokens, such as 512, or None.")
        self.pattern, self.chunk = pattern, size

    def wrap(self, step: StepFn) -> StepFn:
        """The step with lazy logits."""
        return with_apply_rule(self, step, self._rule)

    def _rule(self, next: Next, call: ApplyCall) -> Any:
        return next(call.replace(target=call.target.variant((self.name, self.pattern, self.chunk), self._patch)))

    def _patch(self, module: nn.Module) -> None:
        for head in self._heads(module):
            # An object and not a closure: the copies of a module have modules of their own.
            head.forward = _LazyForward(_checked(head), self.chunk)

    def _heads(self, module: nn.Module) -> list[nn.Module]:
        if self.pattern is not None:
            return select_modules(module, self.pattern, f"chunked_logits({self.pattern!r})")
        find: Callable[[], nn.Module | None] = getattr(module, "get_output_embeddings", lambda: None)
        head = find() or next((m for name, m in module.named_modules() if name in _NAMES), None)
        if head is None:
            return select_modules(module, lambda _name, _module: False, "chunked_logits()")
        return [head]


_NAMES = ("lm_head", "head")


def _checked(head: nn.Module) -> nn.Linear:
    if not isinstance(head, nn.Linear):
        raise PatternError(
            f"lm.chunked_logits takes the head of a language model, an nn.Linear, not {type(head).__name__}. Name it:"
            ' lm.chunked_logits("lm_head")'
        )
    forward = head.__dict__.get("forward")
    if forward is None and getattr(type(head).forward, "__func__", type(head).forward) is nn.Linear.forward:
        return head
    if not hasattr(forward, "full_input"):
        raise PatternError(
            f"the forward of the head that lm.chunked_logits selects, {type(head).__name__}, is not that of nn.Linear:"
            " another transform or a subclass has replaced it. Keep the head out of that transform's pattern, or leave"
            " lm.chunked_logits out."
        )
    return head


class _LazyForward:
    """Replaces the head's `forward`."""

    def __init__(self, head: nn.Linear, chunk: int | None) -> None:
        self._head, self._chunk = head, chunk
        self._full_input = getattr(head.__dict__.get("forward"), "full_input", None)

    def __call__(self, x: Tensor) -> Any:
        if self._full_input is not None:
            x = self._full_input(x)
        return lazy_logits(x, self._head.weight, self._head.bias, self._chunk)
