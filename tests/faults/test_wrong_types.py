"""Every public callable × arguments of plausible wrong types: refused by name, with what was found.

What is wrong is judged by the text of an annotation. A call gets right arguments for all others.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics.classification import BinaryAccuracy

import lumen as lm

NET = nn.Linear(3, 2)
OPTIMIZER = torch.optim.SGD(NET.parameters(), 0.1)
LOADER = lm.Loader({"x": torch.ones(4, 3)}, batch_size=2)


class Anything:
    """A class of the user's."""


def step(state: Any, batch: Any) -> tuple[Any, Any]:
    return state, {}


TEXT, NUMBER, HALF, MODULE, TORCHS = "abc", 5, 0.5, NET, OPTIMIZER
OBJECT, CLASS, LIST, FUNCTION, TRANSFORM = Anything(), Anything, [Anything()], step, lm.donate()
OF = {  # by the text of an annotation: what it does not allow
    "int": (TEXT, HALF, None, MODULE, TORCHS, OBJECT, CLASS, LIST, FUNCTION, TRANSFORM),
    "int | None": (TEXT, HALF, MODULE, OBJECT, CLASS, LIST, FUNCTION),
    "float": (TEXT, None, MODULE, TORCHS, OBJECT, CLASS, LIST, FUNCTION, TRANSFORM),
    "float | None": (TEXT, MODULE, OBJECT, CLASS, LIST, FUNCTION),
    "Scalar": (TEXT, None, MODULE, TORCHS, OBJECT, CLASS, LIST, FUNCTION),
    "ScalarOrSchedule": (TEXT, None, MODULE, TORCHS, OBJECT, CLASS, LIST, TRANSFORM),
    "tuple[Scalar, Scalar]": (TEXT, NUMBER, HALF, None, MODULE, LIST),
    "bool": (TEXT, HALF, None, MODULE, OBJECT, CLASS, LIST),
    "str": (NUMBER, None, MODULE, OBJECT, CLASS, LIST, FUNCTION),
    "str | None": (NUMBER, MODULE, OBJECT, CLASS, LIST, FUNCTION),
    "str | os.PathLike[str]": (NUMBER, None, MODULE, OBJECT, CLASS, LIST, FUNCTION),
    "Every": (NUMBER, TEXT, None, lm.Every, lm.Epochs(1), MODULE, OBJECT),
    "Every | None": (NUMBER, TEXT, lm.Every, lm.Epochs(1), MODULE, OBJECT),
    "Until": (NUMBER, TEXT, None, lm.Epochs, lm.Every(steps=1), MODULE, OBJECT),
    "Checkpointer | None": ("runs/a", Path("runs/a"), lm.Checkpointer, NUMBER, OBJECT),
    "Validate | Sequence[Validate] | None": (LOADER, FUNCTION, lm.Validate, NUMBER, [LOADER], TEXT),
    "Sequence[Transform]": (TRANSFORM, lm.donate, [lm.donate], LIST, NUMBER, TEXT, MODULE, FUNCTION),
    "Transform": (lm.donate, OBJECT, NUMBER, TEXT, FUNCTION),
    "Sequence[Sink]": (lm.sinks.Memory(), lm.sinks.Memory, [lm.sinks.Memory], ["jsonl"], LIST, NUMBER, TEXT),
    "Sequence[Callback]": (lm.EarlyStop(monitor="a"), lm.EarlyStop, [lm.EarlyStop], LIST, NUMBER, TEXT, FUNCTION),
    "Iterable[Any]": (NUMBER, None, MODULE, CLASS, FUNCTION, TRANSFORM),
    "Mapping[str, Any] | None": (TEXT, NUMBER, MODULE, CLASS, FUNCTION, LIST),
    "Mesh | None": (NUMBER, TEXT, {"data": 2}, MODULE, FUNCTION, lm.mesh),
    "nn.Module": (TEXT, NUMBER, None, OBJECT, CLASS, nn.Linear, FUNCTION, TORCHS),
    "Pure | nn.Module": (TEXT, NUMBER, None, OBJECT, CLASS, nn.Linear, FUNCTION, TORCHS),
    "Optimizer": (TORCHS, torch.optim.Adam, NUMBER, None, TEXT, MODULE, lm.optim.adam),
    "GradientTransformation": (TORCHS, torch.optim.Adam, NUMBER, None, TEXT, MODULE, lm.optim.adam, LIST),
    "GradientTransformation | None": (TORCHS, torch.optim.Adam, NUMBER, TEXT, MODULE, lm.optim.adam),
    "Schedule": (NUMBER, None, TEXT, MODULE, CLASS, LIST, OBJECT),
    "Callable[..., Any]": (NUMBER, None, TEXT, LIST, OBJECT, MODULE),
    "StepFn": (NUMBER, None, TEXT, LIST, OBJECT, MODULE, TRANSFORM, CLASS),
    "EvalStep": (NUMBER, None, TEXT, LIST, OBJECT, MODULE, TRANSFORM, CLASS),
    "Callable[[Any, Any], Any]": (NUMBER, None, TEXT, LIST, OBJECT, MODULE, TRANSFORM, CLASS),
    "Callable[[Any, Any], tuple[Any, Any]]": (NUMBER, None, TEXT, LIST, OBJECT, MODULE, TRANSFORM, CLASS),
    "type[torch.optim.Optimizer]": (TORCHS, NUMBER, None, TEXT, MODULE, CLASS, lm.optim.adam, lm.optim.sgd(0.1)),
    "Metric | MetricCollection": (TEXT, NUMBER, None, MODULE, FUNCTION, CLASS),
}
OF |= {
    "torch.device | str": (HALF, None, MODULE, LIST, OBJECT, FUNCTION),
    "Pattern | None": (NUMBER, OBJECT, LIST, MODULE),
    "str | Policy": (NUMBER, None, MODULE, CLASS, OBJECT, LIST),
    "float | Tensor": (TEXT, None, MODULE, CLASS, OBJECT, LIST),
    "Sequence[Schedule]": (NUMBER, None, MODULE, FUNCTION, [NUMBER]),
    "Sequence[Any]": (NUMBER, None, MODULE, FUNCTION, TRANSFORM),
    "TextIO | None": (NUMBER, TEXT, MODULE, FUNCTION),
}
RIGHT: dict[str, Callable[[], Any]] = {  # by the text of an annotation: what it allows
    "int": lambda: 2,
    "float": lambda: 0.5,
    "Scalar": lambda: 0.5,
    "ScalarOrSchedule": lambda: 0.1,
    "str": lambda: "a",
    "bool": lambda: False,
    "str | os.PathLike[str]": lambda: "a",
    "GradientTransformation": lambda: lm.optim.sgd(0.1),
    "Optimizer": lambda: lm.optim.sgd(0.1),
    "Until": lambda: lm.Steps(1),
    "nn.Module": lambda: nn.Linear(3, 2),
    "Pure | nn.Module": lambda: nn.Linear(3, 2),
    "Iterable[Any]": lambda: [torch.ones(2, 3)],
    "Schedule": lambda: lm.optim.constant(0.1),
    "Sequence[Schedule]": lambda: [lm.optim.constant(0.1)],
    "Sequence[int]": list,
    "Iterable[Any] | Mapping[str, Iterable[Any]]": lambda: [torch.ones(2, 3)],
    "Mapping[int, Scalar]": dict,
    "float | None": lambda: 0.5,
    "Mapping[Any, GradientTransformation]": lambda: {"*": lm.optim.sgd(0.1)},
}
RIGHT |= {"Mapping[str, Any]": lambda: {"a": [1, 2]}, "Mapping[str, float]": lambda: {"a": 1.0}}
RIGHT["Metric | MetricCollection"] = lambda: BinaryAccuracy()
OF |= {
    "Tensor": (TEXT, NUMBER, HALF, None, MODULE, OBJECT, CLASS, LIST, FUNCTION),
    "int | Tensor": (TEXT, HALF, None, MODULE, OBJECT, CLASS, LIST, FUNCTION),
    "Tensor | None": (TEXT, NUMBER, MODULE, OBJECT, CLASS, FUNCTION),
    "torch.dtype": (TEXT, NUMBER, None, MODULE, OBJECT, CLASS),
    "Sequence[int]": (TEXT, NUMBER, HALF, None, MODULE, OBJECT, CLASS, LIST, FUNCTION, [0.5]),
    "Sequence[int] | None": (TEXT, NUMBER, HALF, MODULE, OBJECT, CLASS, LIST, FUNCTION),
    "Callable[[Tensor], _Sample]": (NUMBER, None, TEXT, LIST, OBJECT),
    "Callable[[], Any]": (NUMBER, None, TEXT, LIST, OBJECT, MODULE),
    "Spec": (NUMBER, None, TEXT, LIST, OBJECT, {"a": 1}),
    "Mapping[Primitive, Rule]": (NUMBER, None, TEXT, LIST, OBJECT, FUNCTION, {"gradient": step}),
    "Pattern | Sequence[Pattern]": (NUMBER, HALF, None, MODULE, OBJECT, [NUMBER]),
    "Collection[str]": (NUMBER, None, MODULE, OBJECT),
    "Merges | None": (NUMBER, TEXT, MODULE, OBJECT, LIST),
    "str | Sequence[str]": (NUMBER, None, MODULE, OBJECT, LIST),
    "int | str": (HALF, None, MODULE, OBJECT, LIST),
    'Literal["replicate", "sequence"]': (NUMBER, None, TEXT, LIST),
    'Literal["shard", "replicate"]': (NUMBER, None, TEXT, LIST),
    'Literal["sequence", "replicate"]': (NUMBER, None, TEXT, LIST),
}
RIGHT |= {
    "torch.device | str": lambda: "cpu",
    "str | Policy": lambda: "bf16",
    "Mapping[Primitive, Rule]": dict,
    "Spec": lambda: lm.tree.structure({"a": 0}),
    "Pattern | Sequence[Pattern]": lambda: "*",
}
HOT = "called in each step, and stumbles over a wrong type at once"
RETURNED = "made by Lumen, and met as an answer"
ANY = "takes any value or any tree"
OWN = "has its own checks, tested where it is"
UNCHECKED = {
    **dict.fromkeys(
        ("value_and_grad", "apply_gradients", "Mean", "Sum", "Max", "Min", "Last", "Metric", "PerEpoch"), HOT
    ),
    **dict.fromkeys(("all_gather", "axis_index", "pmax", "pmean", "pmin", "psum", "apply_updates"), HOT),
    **dict.fromkeys(("global_norm", "matrices", "learning_rate", "plateau_step", "with_learning_rate"), HOT),
    **dict.fromkeys(("Apply", "Pure", "Result", "Step", "Summary", "CallbackContext", "LRFinderResult"), RETURNED),
    **dict.fromkeys(("HalvingResult", "Trial"), RETURNED),
    **dict.fromkeys(("Aux", "TrainState", "Cursor", "GradientTransformation", "Schedule"), RETURNED),
    **dict.fromkeys(("compute_metrics", "merge_metrics", "dataclass", "row_field", "static", "summary"), ANY),
    **dict.fromkeys(
        ("lookahead_slow_params", "schedule_free_eval_params", "Image", "Histogram", "Text", "figure"), ANY
    ),
    **dict.fromkeys(("configure", "position", "rewind", "run_info", "scalars", "show_params", "split"), ANY),
    **dict.fromkeys(
        ("quantize", "permute", "balanced", "Sink", "Configurable", "Resumable", "ShowsParams", "Store"), OWN
    ),
    **dict.fromkeys(("deepspeed", "tensor_parallel", "sweep", "listed", "Callback", "Transform"), OWN),
    **dict.fromkeys([f"tree.{name}" for name in ("flatten", "leaves", "structure", "paths", "differences")], ANY),
    **dict.fromkeys([f"tree.{name}" for name in ("tensors", "first_tensor", "named_tensors", "nbytes")], ANY),
    **dict.fromkeys([f"extend.{name}" for name in ("slot", "with_slot", "without_slot", "rule_context")], HOT),
    **dict.fromkeys([f"extend.{name}" for name in ("ApplyCall", "Gradient", "GradientCall", "UpdateCall")], RETURNED),
    **dict.fromkeys(("extend.Primitive", "planner.Plan", "bridges.Bridged", "parallel.Mesh"), RETURNED),
    **dict.fromkeys(("extend.param_field", "parallel.rows", "parallel.Style"), ANY),
    **dict.fromkeys(("bridges.module", "lora.merged", "tree.map", "tree.unflatten"), OWN),
    **dict.fromkeys(("parallel.Rowwise", "parallel.SequenceParallel", "parallel.ReplicatedParams"), OWN),
}


QUALIFIED = {  # packages with names that others have too, and their prefix in this table
    "random": lm.random,
    "tree": lm.tree,
    "losses": lm.losses,
    "parallel": lm.parallel,
    "plans": lm.parallel.plans,
    "extend": lm.extend,
    "bridges": lm.bridges,
    "huggingface": lm.bridges.huggingface,
    "lora": lm.bridges.lora,
    "planner": lm.planner,
}


def public() -> dict[str, Callable[..., Any]]:
    """By name, the functions and classes that a reader calls."""
    found: dict[str, Any] = {"TrainState.create": lm.TrainState.create}
    runner = lm.Runner(step, progress=False)
    found |= {f"Runner.{name}": getattr(runner, name) for name in ("fit", "evaluate", "predict", "smoke", "overfit")}
    for package in (lm, lm.optim, lm.sinks, lm.data, lm.metrics, lm.checkpoint):
        for name in package.__all__:
            value = getattr(package, name)
            is_error = isinstance(value, type) and issubclass(value, BaseException)
            if callable(value) and not isinstance(value, types.ModuleType) and not is_error:
                found.setdefault(name, value)
    for prefix, module in QUALIFIED.items():
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", [name for name in own if name[0] != "_"]):
            value = getattr(module, name)
            if callable(value) and not isinstance(value, types.ModuleType) and value not in found.values():
                found[f"{prefix}.{name}"] = value
    return found


PUBLIC = public()


def cells(name: str) -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """The parameter, the wrong value, and the arguments, for each wrong call of a public callable."""
    parameters = inspect.signature(PUBLIC[name]).parameters
    required = [p for p in parameters.values() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    required = [p for p in required if p.kind is not p.VAR_KEYWORD]
    for wrong in parameters.values():
        if wrong.kind is wrong.VAR_KEYWORD:
            continue
        for value in OF.get(str(wrong.annotation).strip("'\""), ()):
            args: list[Any] = []
            kwargs: dict[str, Any] = {}
            for p in required:
                other = value if p is wrong else right(p)
                if p.kind is p.KEYWORD_ONLY:
                    kwargs[p.name] = other
                else:
                    args.append(other)
            if wrong.kind is wrong.VAR_POSITIONAL:
                args.append(value)
            elif wrong not in required:
                kwargs[wrong.name] = value
            yield wrong.name, value, tuple(args), kwargs


def right(parameter: inspect.Parameter) -> Any:
    """A value that a parameter allows."""
    if parameter.name == "state":
        return lm.TrainState.create(nn.Linear(3, 2), lm.optim.sgd(0.1))
    if parameter.name == "key":
        return lm.random.key(0)
    if parameter.name == "rows":
        return torch.arange(2)
    if parameter.name == "low":
        return 0
    text = str(parameter.annotation).strip("'\"")
    if text in RIGHT:
        return RIGHT[text]()
    return step if "Callable" in text or text in ("StepFn", "EvalStep") else torch.ones(2, 3)


def names(value: Any) -> set[str]:
    """What a message may call a value: its text, or its type."""
    kind = value if isinstance(value, type) else type(value)
    items = names(value[0]) if isinstance(value, list) and value else set()
    function = {value.__name__} if inspect.isroutine(value) else set()
    return {repr(value)[:40], kind.__name__, str(value)[:40]} | items | function


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in UNCHECKED])
def test_wrong_types_are_refused_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for parameter, value, args, kwargs in cells(name):
        where = f"{name}({parameter}={value!r:.60})"
        try:
            PUBLIC[name](*args, **kwargs)
        except lm.LumenError as error:
            message = str(error)
            assert isinstance(error, TypeError | ValueError), where  # noqa: PT017
            assert re.search(rf"\b({parameter}|{name.split('.')[-1]})\b", message), f"{where}: {message}"
            assert any(text in message for text in names(value)), f"{where}: {message}"
        except BaseException as error:
            pytest.fail(f"{where}: {type(error).__name__}: {error}")
        else:
            pytest.fail(f"{where} was accepted")


def test_what_is_not_checked_has_a_reason() -> None:
    assert UNCHECKED.keys() <= PUBLIC.keys() | {"split"}
    without = [name for name in PUBLIC if name not in UNCHECKED and not list(cells(name))]
    assert set(without) <= {"donate", "seeded", "identity", "scale_by_trust_ratio", "Memory", "rank", "world_size"}


def test_right_types_of_other_libraries_pass() -> None:
    import numpy as np

    assert lm.Epochs(np.int64(3)).n == 3
    assert lm.Steps(1e3).n == 1000  # type: ignore[arg-type]
    lm.optim.adamw(np.float32(0.1), betas=[0.9, 0.99])  # type: ignore[arg-type]
    lm.optim.sgd(torch.tensor(0.1), momentum=np.float64(0.9))
    lm.Loader({"x": torch.ones(4)}, np.int32(2), shuffle=np.bool_(False), workers=0)  # type: ignore[arg-type]
    lm.Runner(step, transforms=(t for t in [lm.donate()]), sinks=(), progress=False)  # type: ignore[arg-type]
    lm.Checkpointer(Path("runs"), every=lm.Every(steps=5), keep=None)


def test_trees_and_states_of_other_types_are_refused_by_name() -> None:
    spec = lm.tree.structure({"a": 0})
    result = lm.Runner(lambda state, batch: (state, {}), progress=False).fit({}, [torch.ones(1)], until=lm.Steps(1))
    calls: dict[str, Callable[[], Any]] = {
        "lm.tree.map(fn, tree)": lambda: lm.tree.map({"a": 1}, abs),  # type: ignore[arg-type]
        "lm.tree.unflatten(spec, leaves)": lambda: lm.tree.unflatten([1], spec),  # type: ignore[arg-type]
        "leaves is 5": lambda: lm.tree.unflatten(spec, 5),  # type: ignore[arg-type]
        "state=result.export()": lambda: lm.bridges.module(result),
        "state=lm.TrainState.create(net, tx)": lambda: lm.bridges.lora.merged(NET),
        "lm.extend.Primitive.UPDATE": lambda: lm.extend.rule_context({"update": step}).__enter__(),  # type: ignore[dict-item]
    }
    for line, call in calls.items():
        with pytest.raises(lm.errors.ArgumentError, match=re.escape(line)):
            call()


def test_arguments_that_are_not_there_are_refused_with_the_line_to_write() -> None:
    calls: dict[str, Callable[[], Any]] = {
        "lm.Runner.fit: there is no argument 'max_epochs'.* until=lm.Epochs": lambda: lm.Runner(
            step, progress=False
        ).fit({}, [], max_epochs=3),  # type: ignore[call-arg]
        "lm.optim.adamw: there is no argument 'learning_rate'.* lr=1e-3": lambda: lm.optim.adamw(learning_rate=1e-3),  # type: ignore[call-arg]
        r"takes no params[\s\S]*create\(net, lm.optim.sgd": lambda: lm.optim.sgd(NET.parameters(), lr=0.1),  # type: ignore[misc,arg-type]
        r"takes no params[\s\S]*create\(net, lm.optim.adam": lambda: lm.optim.adam(NET.parameters()),  # type: ignore[arg-type]
        "lm.accumulate: there is no argument 'steps'": lambda: lm.accumulate(steps=2),  # type: ignore[call-arg]
        r"batches=len\(loader\)": lambda: lm.bridges.lightning(NET, batches=LOADER),  # type: ignore[arg-type]
        r"lm.sweep\(lr=\[": lambda: lm.sweep(lr=0.1),
        "scheduler of torch": lambda: lm.optim.adamw(torch.optim.lr_scheduler.StepLR(OPTIMIZER, 1)),  # type: ignore[arg-type]
    }
    for line, call in calls.items():
        with pytest.raises(lm.LumenError, match=line):
            call()


def test_a_step_that_takes_other_arguments_is_refused_before_it_runs() -> None:
    def lightnings(state: Any, batch: Any, batch_idx: int) -> Any:
        return state, {}

    def swapped(batch: Any, state: Any) -> Any:
        return state, {}

    for user in (lightnings, swapped):
        with pytest.raises(lm.errors.StepError, match=rf"def {user.__name__}\(state, batch\)"):
            lm.Runner(user, progress=False)  # type: ignore[arg-type]
