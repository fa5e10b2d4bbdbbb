"""What a newcomer gets wrong: each is refused at once, by name, with the line to write."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lumen as lm
from lumen import errors
from lumen.core.batching import split

BATCH = torch.ones(2, 3)


def net() -> nn.Module:
    return nn.Linear(3, 2)


def state_of(module: nn.Module | None = None, tx: Any = None) -> lm.TrainState:
    return lm.TrainState.create(net() if module is None else module, tx or lm.optim.sgd(0.1))


def identity(state: Any, batch: Any) -> tuple[Any, Any]:
    return state, {}


def runner(**options: Any) -> lm.Runner:
    return lm.Runner(identity, progress=False, **options)


def fit(state: Any = None, **options: Any) -> lm.Result:
    return runner().fit(state_of() if state is None else state, [BATCH], until=lm.Steps(1), **options)


def pruned() -> nn.Module:
    module = net()
    prune.l1_unstructured(module, "weight", 0.3)
    return module


def text_metric(state: Any, batch: Any) -> tuple[Any, Any]:
    return state, {"name": "x"}


class Own(lm.Callback):
    """May publish a metric of any name at any time."""


def logged() -> dict[str, float]:
    runner = lm.Runner(lambda state, batch: (state, {"loss": batch.mean()}), progress=False)
    return runner.fit(state_of(), [BATCH], until=lm.Steps(1)).metrics


WRONG: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "one transform": (errors.StepError, r"Write transforms=\[lm.donate\(\)\]", lambda: runner(transforms=lm.donate())),
    "a transform's class": (errors.StepError, r"transforms=\[lm.donate\(", lambda: runner(transforms=[lm.donate])),
    "no transform": (errors.StepError, "transforms has 3; it takes", lambda: runner(transforms=[3])),
    "one sink": (errors.StepError, r"Write sinks=\[lm.sinks", lambda: runner(sinks=lm.sinks.Memory())),
    "a name for a sink": (errors.StepError, r"sinks has 'jsonl'; it takes", lambda: runner(sinks=["jsonl"])),
    "one callback": (errors.StepError, r"Write callbacks=\[", lambda: runner(callbacks=lm.EarlyStop(monitor="a"))),
    "a callback's class": (errors.StepError, "has the class EarlyStop", lambda: runner(callbacks=[lm.EarlyStop])),
    "a path": (errors.StepError, r'checkpoint=lm.Checkpointer\("runs/a"\)', lambda: runner(checkpoint="runs/a")),
    "every=5": (errors.StepError, r"every=lm.Every\(steps=1000\)", lambda: lm.Checkpointer("runs/a", every=5)),  # type: ignore[arg-type]
    "a module for a state": (errors.StepError, r"state = lm.TrainState.create\(net", lambda: fit(net())),
    "a loader to validate": (errors.StepError, r"validate=lm.Validate\(eval_step", lambda: fit(validate=[BATCH])),
    "resume=None": (errors.StepError, r'resume has None; it takes "never", "auto"', lambda: fit(resume=None)),
    "resume=True": (errors.StepError, 'resume="auto"', lambda: fit(resume=True)),
    "torch's optimizer": (
        errors.StateError,
        r"lm.optim.from_torch\(torch.optim.SGD, lr=1e-3\)",
        lambda: state_of(tx=torch.optim.SGD(net().parameters(), 0.1)),
    ),
    "an optimizer's class": (errors.StateError, r"from_torch\(torch.optim.Adam", lambda: state_of(tx=torch.optim.Adam)),
    "pruned": (errors.ParamsError, r"prune.remove\(layer, 'weight'\)", lambda: state_of(pruned())),
    "a tuple of tensors": (
        errors.BatchError,
        r"a tuple of 2 tensors, .* Write lm.Loader\(\(x, y\), batch_size=64\)",
        lambda: runner().fit(state_of(), (BATCH, torch.ones(2)), until=lm.Steps(1)),
    ),
    "a metric without its prefix": (
        KeyError,
        r"'loss' was not logged; .*metrics\['train/loss'\]",
        lambda: logged()["loss"],
    ),
    "val_loss": (
        errors.StepError,
        r"EarlyStop\(monitor='val_loss'\) names no metric .* Write \"val/loss\"",
        lambda: runner(callbacks=[lm.EarlyStop(monitor="val_loss")]).fit(state_of(), [BATCH], until=lm.Steps(1)),
    ),
    "val_loss, with a callback of the user's": (
        errors.StepError,
        "EarlyStop waits for 'val_loss'.*'val/loss'",
        lambda: runner(callbacks=[Own(), lm.EarlyStop(monitor="val_loss")]).fit(
            state_of(), [BATCH], until=lm.Epochs(9), validate=lm.Validate(lambda *_: {"loss": torch.ones(())}, [BATCH])
        ),
    ),
    "a text as a number of steps": (errors.HyperparameterError, r"Write: lm.Steps\(1000\)", lambda: lm.Steps("3")),  # type: ignore[arg-type]
    "no epochs": (errors.HyperparameterError, r"got 0. Write: lm.Epochs\(10\)", lambda: lm.Epochs(0)),
    "no interval": (errors.HyperparameterError, r"Write: lm.Every\(steps=500\)", lambda: lm.Every(steps=0)),
    "text as a metric": (
        errors.MetricError,
        "a metric is 'x', of type str",
        lambda: lm.Runner(text_metric, progress=False).fit(state_of(), [BATCH], until=lm.Steps(1)),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_it_is_refused_with_the_line_to_write(name: str) -> None:
    kind, message, call = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


def test_numpy_numbers_are_numbers() -> None:
    for value in (np.float32(0.5), np.float64(0.5)):
        assert lm.optim.learning_rate(lm.optim.adamw(value).init({"w": torch.ones(2)})).item() == 0.5
    schedule = lm.optim.warmup_cosine(1.0, steps=10, warmup=0)
    assert schedule(torch.tensor(0)).item() == 1.0


COUNTS: dict[str, Callable[[Any], object]] = {
    "accumulate": lm.accumulate,
    "microbatch": lambda n: lm.accumulate(microbatch=n),
    "unroll": lm.unroll,
    "ensemble": lm.ensemble,
    "every": lambda n: lm.local(every=n),
    "chunk": lambda n: lm.chunked_logits(chunk=n),
    "check_every": lambda n: lm.ddp(check_every=n),
    "stage": lambda n: lm.fsdp(stage=n),
    "prefetch": lambda n: lm.fsdp(prefetch=n),
    "microbatches": lambda n: lm.pipeline(microbatches=n),
    "stages": lambda n: lm.pipeline(microbatches=2, stages=n),
    "groups": lambda n: lm.parallel.Colwise(groups=n),
    "limit": lambda n: lm.Validate(step=identity, data=[], every=lm.Every(steps=1), limit=n),
    "active": lambda n: repr(lm.Profile("unwritten", active=n)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_an_integer_of_numpy_is_an_integer(name: str) -> None:
    make = COUNTS[name]
    assert make(np.int64(2)) == make(2)
    for wrong in (True, 2.5, "two", torch.tensor(2), np.ones(2, int)):
        with pytest.raises(lm.errors.LumenError, match=name):
            make(wrong)


def test_schedules_count_in_integers_of_numpy() -> None:
    two = np.int64(2)
    for schedule in (lm.optim.cosine(1.0, steps=two), lm.optim.warmup_cosine(1.0, steps=np.int32(4), warmup=two)):
        assert 0 <= schedule(torch.tensor(2)).item() <= 1


def test_a_step_may_be_an_integer_of_numpy(tmp_path: Path) -> None:
    with lm.checkpoint.Store(tmp_path, keep=np.int64(1)) as store:
        store.save(np.int64(7), {"w": torch.ones(1)})
        store.wait()
        assert store.steps() == [7]
        with pytest.raises(lm.errors.CheckpointError, match="an int from 0 up"):
            store.save(-1, {"w": torch.ones(1)})


@pytest.mark.parametrize("kind", [lm.donate, lm.seeded])
def test_a_transform_without_arguments_says_so(kind: Any) -> None:
    with pytest.raises(
        lm.errors.ArgumentError, match=rf"takes no arguments, and got 3, x=1. Write: lm.{kind.name}\(\)"
    ):
        kind(3, x=1)


@pytest.mark.parametrize("stack", [(), (lm.accumulate(2),), (lm.compile(backend="eager"),)], ids=str)
def test_compiled_modules_inside_are_the_modules(stack: tuple[lm.Transform, ...]) -> None:
    """Also one in two places; the user's own module stays compiled."""
    shared, last = nn.Linear(3, 3), nn.Linear(3, 2)
    plain = nn.Sequential(nn.Sequential(shared, nn.Tanh()), shared, last)
    compiled = torch.compile(shared, backend="eager")
    module = nn.Sequential(nn.Sequential(compiled, nn.Tanh()), compiled, torch.compile(last, backend="eager"))

    def step(state: Any, x: torch.Tensor) -> tuple[Any, Any]:
        loss_fn = lambda params, x: state.apply(params, x)[0].square().mean()  # noqa: E731
        loss, grads = lm.value_and_grad(loss_fn)(state.params, x)
        return state.apply_gradients(grads), {"loss": loss}

    found, expected = (lm.compose(*stack)(step)(state_of(each), BATCH)[0].params for each in (module, plain))
    assert list(found) == list(expected) == ["0.0.weight", "0.0.bias", "2.weight", "2.bias"]
    torch.testing.assert_close(found, expected)
    assert module[1] is compiled


def test_a_compiled_module_is_the_module() -> None:
    module = net()
    state = state_of(torch.compile(module, backend="eager"))
    assert list(state.params) == ["weight", "bias"]
    torch.testing.assert_close(state.apply(state.params, BATCH)[0], module(BATCH))


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=sparse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x)


@pytest.mark.parametrize("stack", [(), (lm.accumulate(2),), (lm.donate(), lm.accumulate(2))], ids=str)
def test_sparse_gradients_train_as_dense_ones(stack: tuple[lm.Transform, ...]) -> None:
    def step(state: Any, x: torch.Tensor) -> tuple[Any, Any]:
        def loss_fn(params: Any, x: torch.Tensor) -> torch.Tensor:
            return state.apply(params, x)[0].square().mean()

        loss, grads = lm.value_and_grad(loss_fn)(state.params, x)
        return state.apply_gradients(grads), {"loss": loss}

    x = torch.tensor([0, 1, 1, 4])
    trained = []
    for sparse in (True, False):
        torch.manual_seed(0)
        wrapped = lm.compose(*stack)(step)
        state = wrapped.init(state_of(Words(sparse), lm.optim.adamw(0.1)))
        for _ in range(2):
            state, _ = wrapped(state, x)
        trained.append(state.params["table.weight"])
    torch.testing.assert_close(*trained)


def test_the_version_is_there() -> None:
    assert lm.__version__.count(".") >= 2


@lm.dataclass
class WithDefault(lm.TrainState):
    """A state with a field that has a default."""

    memory: torch.Tensor | None = None


def test_a_field_without_a_default_after_one_with_it() -> None:
    with pytest.raises(lm.LumenError, match=r"hidden: torch.Tensor = dataclasses.field\(kw_only=True\)"):

        @lm.dataclass
        class Later(WithDefault):
            hidden: torch.Tensor


def test_complex_params_are_refused_with_the_way_to_write_them() -> None:
    net = torch.nn.Linear(2, 2, dtype=torch.complex64)
    for make in (lm.optim.sgd, lm.optim.adamw, lm.optim.muon, lm.optim.lamb):
        with pytest.raises(lm.LumenError, match=r"torch.view_as_real\(w\)"):
            lm.TrainState.create(net, make(0.1))


class Rotation(torch.nn.Module):
    """A complex matrix, as the message says."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.view_as_real(torch.randn(3, 3, dtype=torch.complex128)).clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.view_as_complex(self.w)


@pytest.mark.parametrize("stack", [(), (lm.accumulate(2), lm.donate())], ids=len)
def test_complex_params_kept_as_real_ones_train_as_in_torch(stack: tuple[lm.Transform, ...]) -> None:
    torch.manual_seed(0)
    net, x = Rotation(), torch.randn(4, 3, dtype=torch.complex128)
    raw = torch.nn.Parameter(torch.view_as_complex(net.w.detach()).clone())
    optimizer = torch.optim.AdamW([raw], lr=1e-2)

    def step(state: lm.TrainState, batch: torch.Tensor) -> tuple[lm.TrainState, dict[str, torch.Tensor]]:
        loss_fn = lambda p, x: state.apply(p, x)[0].abs().square().mean()  # noqa: E731
        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    wrapped = lm.compose(*stack)(step)
    state = wrapped.init(lm.TrainState.create(net, lm.optim.adamw(1e-2)))
    for _ in range(3):
        state, _ = wrapped(state, x)
        optimizer.zero_grad()
        (x @ raw).abs().square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(torch.view_as_complex(state.params["w"]), raw.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stack", [(), (lm.accumulate(2),), (lm.donate(),), (lm.accumulate(3), lm.donate())], ids=str)
def test_sparse_batches_train_as_dense_ones(stack: tuple[lm.Transform, ...]) -> None:
    torch.manual_seed(0)
    dense = torch.randn(5, 4) * (torch.rand(5, 4) > 0.5)
    net = torch.nn.Linear(4, 2)

    def step(state: lm.TrainState, batch: dict[str, torch.Tensor]) -> tuple[lm.TrainState, dict[str, torch.Tensor]]:
        def loss_fn(p: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> lm.Mean:
            out = torch.sparse.mm(batch["x"], p["weight"].T) if batch["x"].is_sparse else batch["x"] @ p["weight"].T
            return lm.Mean.of((out + p["bias"] - batch["y"]).square().mean(1))

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    wrapped = lm.compose(*stack)(step)
    found = []
    for x in (dense, dense.to_sparse_coo()):
        state = wrapped.init(lm.TrainState.create(net, lm.optim.adamw(1e-2)))
        for _ in range(2):
            state, _ = wrapped(state, {"x": x, "y": dense[:, :2]})
        found.append(state.params)
    for name, p in found[0].items():
        torch.testing.assert_close(found[1][name], p, rtol=1e-5, atol=1e-6)


def test_sparse_batches_of_other_layouts_are_refused_where_they_are_split() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch: the layout is in beta
        x = torch.eye(4).to_sparse_csr()
    with pytest.raises(lm.LumenError, match=r"sparse_csr tensor .*to_sparse_coo\(\)"):
        split({"x": x}, 2)


def test_compressed_sparse_batches_have_no_strides_and_run_in_a_compiled_step() -> None:
    def step(state: Any, x: torch.Tensor) -> tuple[Any, Any]:
        loss_fn = lambda params, x: state.apply(params, x.to_dense())[0].square().mean()  # noqa: E731
        loss, grads = lm.value_and_grad(loss_fn)(state.params, x)
        return state.apply_gradients(grads), {"loss": loss}

    dense = torch.eye(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR|invariant)")
        x = dense.to_sparse_csr()
    compiled, module = lm.compile(backend="eager")(step), net()
    state, _ = compiled(state_of(module), x)
    state, _ = compiled(state, x)
    expected = step(step(state_of(module), dense)[0], dense)[0]
    torch.testing.assert_close(state.params, expected.params)
