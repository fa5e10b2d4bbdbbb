"""`lm.grad_cache`: a loss that needs the embeddings of all rows at once, in a form that microbatches can compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lumen import tree
from lumen.core import batching, rules
from lumen.core.arguments import checked
from lumen.core.primitives import Aux, LossFn, unwrapped
from lumen.errors import LossError


@checked
def grad_cache(encode: Callable[..., Any], loss: Callable[..., Any]) -> LossFn:
    """The loss function `loss(params, encode(params, batch), batch)`, exact under `lm.accumulate` for any `loss`.

    For contrastive losses and others that compare the rows of a batch with each other. `encode(params, batch,
    *extras)` returns embeddings: a tensor, or a tree of tensors, with one row for each row of the batch, each computed
    from that row alone; `(embeddings, lm.Aux(buffers=..., metrics=...))` where the model has buffers. `loss(params,
    embeddings, batch, *extras)` returns what any loss function does, but no buffers; it may use params itself, such as
    a temperature. The result goes to `lm.value_and_grad` (with `has_aux=True` where either returns an `lm.Aux`).

    Without `lm.accumulate` it is that loss, bit for bit. Under it the embeddings of all microbatches are computed
    without a graph, then the loss on all rows with its gradient in the embeddings, then each microbatch again, with the
    same dropout masks and buffers, and back: one more forward pass, and the activations of one microbatch at a time.

    Law: `accumulate(k)(step) == step`, up to the order of floating sums, for every `loss` and for each `encode` whose
    rows do not depend on each other; BatchNorm in training mode sees one microbatch at a time.

    Over processes, `loss` sees this process's rows unless it gathers the others' by `lm.all_gather`.

    Raises `LossError` for embeddings that are no rows of the batch, for an `encode` that returns other embeddings when
    it is called again, and where a transform that splits the batch cannot see the function (it was called inside
    another one, or used under `lm.dp_sgd`). Algorithm: GradCache, Gao et al. 2021, "Scaling Deep Contrastive
    Learning Batch Size under Memory Limited Setup".

    >>> import lumen as lm, torch
    >>> def encode(params, batch):
    ...     return batch @ params["w"]
    >>> def loss(params, embeddings, batch):
    ...     scores = embeddings @ embeddings.T * params["scale"]
    ...     return torch.nn.functional.cross_entropy(scores, torch.arange(len(batch)))
    >>> def step(params, batch):
    ...     loss_value, grads = lm.value_and_grad(lm.grad_cache(encode, loss))(params, batch)
    ...     return params, {"loss": loss_value, **grads}
    >>> params = {"w": torch.eye(2), "scale": torch.tensor(2.0)}
    >>> batch = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> _, whole = step(params, batch)
    >>> _, accumulated = lm.accumulate(2)(step)(params, batch)
    >>> all(torch.allclose(value, accumulated[name]) for name, value in whole.items())
    True
    """
    return GradCache(encode, loss)


class GradCache:
    """A loss function made of two, for transforms that split its batch to take apart."""

    def __init__(self, encode: Callable[..., Any], loss: Callable[..., Any]) -> None:
        self.__wrapped__ = self.encode = encode
        self.loss = loss
        self.__qualname__ = f"grad_cache({name_of(encode)}, {name_of(loss)})"

    def __call__(self, params: Any, batch: Any, *extras: Any) -> Any:
        """The loss of all rows, from a graph through both functions."""
        embeddings, aux = self.encoded(params, batch, extras)
        out = self.compared(params, embeddings, batch, extras)
        if aux is None:
            return out
        loss, other = out if is_pair(out) else (out, None)
        return loss, joined_aux(aux, other)

    def __repr__(self) -> str:
        return f"lm.{self.__qualname__}"

    def encoded(self, params: Any, batch: Any, extras: tuple[Any, ...]) -> tuple[Any, Aux | None]:
        """The embeddings of these rows, checked, and the aux that came with them."""
        out = self.encode(params, batch, *extras)
        embeddings, aux = out if is_pair(out) and isinstance(out[1], Aux) else (out, None)
        leaves = tree.leaves(embeddings)
        if not leaves:
            raise LossError(f"{name_of(self.encode)} returned no embeddings, but {embeddings!r:.60}.")
        size = batching.count(batch)
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or leaf.shape[:1] != (size,) or leaf.is_complex():
                raise self._not_rows(tree.paths(embeddings)[index], leaf, size)
        return embeddings, aux

    def compared(self, params: Any, embeddings: Any, batch: Any, extras: tuple[Any, ...]) -> Any:
        """What `loss` returns for the embeddings of all rows."""
        splitter = rules.splitter()
        if splitter is not None:
            raise LossError(
                f"{splitter} hands a microbatch to {self!r}, whose loss needs all rows. Under lm.accumulate hand"
                " the function itself to value_and_grad, lm.value_and_grad(lm.grad_cache(encode, loss)), not one that"
                " calls it; what belongs around it goes into loss. Under other transforms that split, leave one out."
            )
        out = self.loss(params, embeddings, batch, *extras)
        if is_pair(out) and isinstance(out[1], Aux) and tree.leaves(out[1].buffers):
            raise LossError(
                f"{name_of(self.loss)} returned buffers, lm.Aux(buffers=...), which {self!r} takes from"
                f" {name_of(self.encode)} alone. Apply the model there: return embeddings, lm.Aux(buffers=buffers)."
            )
        return out

    def _not_rows(self, path: str, leaf: Any, size: int) -> LossError:
        what = f"embeddings[{path!r}]" if path else "embeddings"
        form = f"of shape {tuple(leaf.shape)} and {leaf.dtype}" if isinstance(leaf, Tensor) else f"{leaf!r:.40}"
        return LossError(
            f"{name_of(self.encode)} returned {what} {form} for a batch of {size} rows. Return real tensors with one"
            ' row for each row of the batch, as {"image": images, "text": texts}. For two views of each row return two'
            " tensors: one, other = views.chunk(2). What concerns the whole batch is computed in loss."
        )


def find(loss_fn: LossFn) -> GradCache | None:
    """The `GradCache` at the core of `loss_fn`, inside of what Lumen's transforms have put around it."""
    core = unwrapped(loss_fn)
    return core if isinstance(core, GradCache) else None


def joined_aux(encoded: Any, compared: Any) -> Any:
    """One aux of those that the two functions returned; None or () is none."""
    if not isinstance(encoded, Aux):
        return compared
    if compared is None or (type(compared) is tuple and not compared):
        return encoded
    if not isinstance(compared, Aux):
        raise LossError(
            f"encode returned an lm.Aux, and loss an aux of type {type(compared).__name__}, so they cannot be joined."
            " Return (value, lm.Aux(metrics={...})) from loss."
        )
    twice = sorted(encoded.metrics.keys() & compared.metrics.keys())
    if twice:
        raise LossError(
            f"encode and loss both return a metric {twice[0]!r} in lm.Aux(metrics=...); give one another name."
        )
    return Aux(encoded.buffers, {**encoded.metrics, **compared.metrics})


def is_pair(out: Any) -> bool:
    """Whether a loss function returned something beside its loss."""
    return type(out) is tuple and len(out) == 2


def name_of(function: Any) -> str:
    """What a function is called in messages."""
    return getattr(function, "__qualname__", repr(function)).rpartition(".")[2]
