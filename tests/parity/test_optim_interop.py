"""`from_torch`: any torch optimizer, its memory in the pytree, bitwise."""

import functools

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import lumen as lm
from lumen import optim
from lumen.errors import HyperparameterError, PurityError

SHAPES = {"a": (5, 3), "b": (4, 6)}

CASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "ASGD": (torch.optim.ASGD, {"t0": 3, "lambd": 1e-2}),
    "Rprop": (torch.optim.Rprop, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "Muon": (torch.optim.Muon, {}),
}


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class IntegerSteps(torch.optim.Optimizer):
    """As older optimizers outside torch: the number of steps is a Python number."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                memory = self.state[p]
                memory["step"] = memory.get("step", 0) + 1
                memory["factor"] = memory.get("factor", 1.0) / 2
                p.sub_(p.grad, alpha=group["lr"] * memory["step"] * memory["factor"])


class GroupCounts(IntegerSteps):
    """As most optimizers of other libraries: the number of steps, and what adapts to gradients, is in the group."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["d"] = max(group.get("d", 0), sum(float(p.grad.norm()) for p in group["params"]))
            group["sums"] = group.get("sums", torch.zeros(2)) + group["step"]
            for p in group["params"]:
                self.state[p]["sum"] = self.state[p].get("sum", 0) + p.grad
                p.grad.zero_()
                p.sub_(self.state[p]["sum"], alpha=group["lr"] * group["d"] / (group["step"] + float(group["sums"][0])))


class TwoModes(GroupCounts):
    """As schedule-free optimizers: no step without `train()`."""

    def eval(self):
        self.param_groups[0]["train_mode"] = False

    def train(self):
        self.param_groups[0]["train_mode"] = True

    def step(self):
        if not self.param_groups[0].get("train_mode"):
            raise RuntimeError("not in train mode")
        super().step()


class SharedConstant(IntegerSteps):
    """As quantized optimizers: a table that the states of all params share."""

    @torch.no_grad()
    def step(self):
        table = torch.full((3,), 0.5)
        for p in self.param_groups[0]["params"]:
            known = self.state[p].setdefault("table", table)
            p.sub_(p.grad * known[0], alpha=self.param_groups[0]["lr"])


class Containers(IntegerSteps):
    """As optimizers with preconditioners: a list, a dict by numbers, a name and what is not there yet."""

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            memory = self.state[p]
            if not memory:
                averages = {decay: torch.zeros_like(p) for decay in (0.0, 0.9)}
                memory |= {"averages": averages, "sums": [p.sum(), 0.0], "mode": "mean", "bias": None}
            for decay, average in memory["averages"].items():
                p.sub_(average.mul_(decay).add_(p.grad), alpha=self.param_groups[0]["lr"])
            memory["sums"][1] += 1.0
            p.sub_(memory["sums"][0] / memory["sums"][1])


class LateCount(IntegerSteps):
    """Changes an option when several steps are done: one that is no argument, or, if `named`, one that is."""

    def __init__(self, params, lr=0.1, phase=1, named=False):
        super().__init__(params, lr)
        self.param_groups[0].update({"phase" if named else "stage": phase})

    def step(self):
        super().step()
        if self.state[self.param_groups[0]["params"][0]]["step"] == 5:
            self.param_groups[0]["phase" if "phase" in self.param_groups[0] else "stage"] += 1


class LateShape(IntegerSteps):
    """A number of the group that is a tensor of one entry later, as an estimate from dot products."""

    def step(self):
        super().step()
        group = self.param_groups[0]
        count = group["count"] = group.get("count", 0.0) + 1.0
        if isinstance(count, float) and count == 5.0:
            group["count"] = torch.full((1,), count)


class AttributeCount(IntegerSteps):
    calls = 0

    def step(self):
        super().step()
        self.calls = self.calls + 1


class NamesNoParam(IntegerSteps):
    def step(self):
        super().step()
        self.state["all"]["step"] = 1


class Queue(IntegerSteps):
    def step(self):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("queue", []).append(p.grad)


class Projector(IntegerSteps):
    def step(self):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["projector"] = object()


class Fails(IntegerSteps):
    def step(self):
        raise ValueError("only matrices")


class OwnSchedule(IntegerSteps):
    def step(self):
        super().step()
        self.param_groups[0]["lr"] *= 0.5


THIRD_PARTY = {
    each.__name__: (each, {})
    for each in (IntegerSteps, GroupCounts, TwoModes, SharedConstant, Containers, LateCount, LateShape)
}


@pytest.mark.filterwarnings("ignore:TwoModes has other params")
@pytest.mark.parametrize("case", [*CASES, *THIRD_PARTY])
def test_from_torch_is_bitwise_torch(case):
    cls, kwargs = {**CASES, **THIRD_PARTY}[case]
    tx = optim.from_torch(cls, **kwargs)
    params = tensors(0)
    theirs = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = cls(list(theirs.values()), **kwargs)
    if case == "TwoModes":
        optimizer.train()
    opt_state = tx.init(params)
    spec = lm.tree.structure(opt_state)
    for step in range(50):
        grads = tensors(step + 1)
        before = lm.tree.map(torch.clone, (params, opt_state))
        kept = lm.tree.map(torch.clone, grads)
        new_params, new_state = tx.apply(grads, opt_state, params)
        assert_same((params, opt_state, grads), (*before, kept))  # without donation nothing changes
        params, opt_state = new_params, new_state
        assert lm.tree.structure(opt_state) == spec
        for name, p in theirs.items():
            p.grad = grads[name].clone()
        optimizer.step()
        assert all(torch.equal(params[name], p) for name, p in theirs.items())


def assert_same(left, right):
    assert all(torch.equal(a, b) for a, b in zip(lm.tree.leaves(left), lm.tree.leaves(right), strict=True))


def test_learning_rate_is_in_the_state_and_may_be_scheduled():
    grads = tensors(1)
    tx = optim.from_torch(torch.optim.SGD, lr=optim.linear(0.1, 10, 0.0))
    params, opt_state = tensors(0), tx.init(tensors(0))
    for step in range(3):
        params, opt_state = tx.apply(grads, opt_state, params)
        assert optim.learning_rate(opt_state).item() == pytest.approx(0.1 * (1 - step / 10))
    expected = tensors(0)["a"] - (0.1 + 0.09 + 0.08) * grads["a"]
    torch.testing.assert_close(params["a"], expected)

    tx = optim.from_torch(torch.optim.SGD, lr=0.1)
    opt_state = tx.init(params)
    changed = opt_state.replace(hparams={"lr": torch.tensor(0.5, dtype=torch.float64)})
    found, _ = tx.apply(grads, changed, params)
    torch.testing.assert_close(found["a"], params["a"] - 0.5 * grads["a"])


def test_skip_and_donate():
    tx = optim.from_torch(torch.optim.AdamW)
    params, opt_state = tensors(0), tx.init(tensors(0))
    params, opt_state = tx.apply(tensors(1), opt_state, params)
    skipped = tx.apply(tensors(2), opt_state, params, skip=torch.tensor(True))
    assert_same(skipped, (params, opt_state))
    kept = tx.apply(tensors(2), opt_state, params)
    given = lm.tree.map(torch.clone, params)
    donated = tx.apply(tensors(2), lm.tree.map(torch.clone, opt_state), given, donate=True)
    assert donated[0] is given
    assert_same(kept, donated)


def test_update_gives_the_difference():
    tx = optim.from_torch(torch.optim.Adamax)
    params, opt_state = tensors(0), tx.init(tensors(0))
    updates, _ = tx.update(tensors(1), opt_state, params)
    moved, _ = tx.apply(tensors(1), opt_state, params)
    torch.testing.assert_close(optim.apply_updates(params, updates), moved)


def test_tracing_vmap_and_differentiation_are_refused():
    tx = optim.from_torch(torch.optim.SGD, lr=0.1)
    params, grads = {"w": torch.randn(3)}, {"w": torch.randn(3)}
    opt_state = tx.init(params)
    run = functools.partial(tx.apply, grads, opt_state)
    with pytest.raises(PurityError, match="eager mode only"):
        torch.func.vmap(lambda w: run({"w": w})[0])(torch.randn(2, 3))
    with pytest.raises(PurityError, match="eager mode only"):
        make_fx(lambda w: run({"w": w})[0]["w"])(params["w"])
    with pytest.raises(PurityError, match="eager mode only"):
        run({"w": params["w"].requires_grad_()})


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (torch.optim.SGD, {"lr": -1.0}, "lr=-1.0"),
        (torch.optim.SGD, {"lr": float("nan")}, "lr=nan"),
        (torch.optim.SGD, {"lr": 0.1, "momentum": -1.0}, "momentum"),
        (torch.optim.SGD, {"rate": 0.1}, "rate"),
        (torch.optim.LBFGS, {}, "closure"),
    ],
)
def test_bad_arguments_are_refused(cls, kwargs, message):
    with pytest.raises(HyperparameterError, match=message):
        optim.from_torch(cls, **kwargs)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (AttributeCount, "AttributeCount counts in its attribute 'calls', .* Write lm.optim.adamw"),
        (NamesNoParam, "state that belongs to no param"),
        (Queue, r"Queue keeps 'queue' in its state with another structure at each step, .* Write lm.optim.adamw"),
        (Projector, "Projector keeps in its state .* tensors and numbers: 'projector' of type object, .* Write lm"),
        (Fails, r"Fails fails at a step .* \(ValueError: only matrices\). Write lm.optim.adamw"),
        (torch.optim.SparseAdam, "SparseAdam fails at a step with a dense gradient .* Write lm.optim.adamw"),
        (OwnSchedule, "changes its learning rate"),
        (type("LionSchedule", (OwnSchedule,), {}), r"Write lm.optim.lion\(...\)"),
    ],
)
def test_what_cannot_be_carried_is_refused_before_the_first_step(cls, message):
    with pytest.raises(HyperparameterError, match=message):
        optim.from_torch(cls).init({"w": torch.zeros(2)})


def test_other_params_for_evaluation_are_warned_of():
    with pytest.warns(lm.InexactWarning, match=r"TwoModes .*lm.optim.schedule_free_eval_params"):
        optim.from_torch(TwoModes).init({"w": torch.zeros(2)})


def test_what_is_counted_late_is_refused():
    tx = optim.from_torch(LateCount, named=True)
    params, opt_state = tensors(0), tx.init(tensors(0))
    with pytest.raises(HyperparameterError, match="LateCount changes 'phase' of its param_groups after its first"):
        for step in range(5):
            params, opt_state = tx.apply(tensors(step), opt_state, params)


@pytest.mark.parametrize("around", [[], [lm.accumulate(2)], [lm.donate()], [lm.guard(), lm.donate()]], ids=str)
@pytest.mark.parametrize("cls", [GroupCounts, SharedConstant, Containers])
def test_counts_of_param_groups_are_part_of_the_state(cls, around, tmp_path):
    torch.manual_seed(0)
    net, batch = torch.nn.Linear(3, 2), torch.randn(6, 3)

    def step(state, batch):
        loss_fn = lambda params, batch: state.apply(params, batch)[0].square().mean()  # noqa: E731
        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    wrapped = lm.compose(*around)(step)
    start = lm.TrainState.create(net, optim.from_torch(cls, lr=0.01))
    state = wrapped.init(start)
    for number in range(4):
        state, _ = wrapped(state, batch)
        if number == 1:  # through a checkpoint
            lm.checkpoint.save(tmp_path / "here", wrapped.export(state))
            state = wrapped.init(lm.checkpoint.restore(tmp_path / "here", start))
    optimizer = cls(net.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(wrapped.export(state).params[name], p.detach(), rtol=1e-6, atol=1e-7)
    if cls is GroupCounts:
        assert int(state.opt_state.groups[0]["step"]) == 4


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_tensors_that_wrap_others_are_part_of_the_state(name, tmp_path):
    """Moments in few bits are tensors of a subclass; their codes, scales and tables are leaves."""
    cls = getattr(pytest.importorskip("torchao.optim"), name)
    torch.manual_seed(0)
    params = {"w": torch.randn(64, 64), "b": torch.randn(64)}
    theirs = {key: p.clone().requires_grad_() for key, p in params.items()}
    with torch.compiler.set_stance("force_eager"):  # it compiles its rule for each shape
        optimizer, tx = cls(list(theirs.values())), optim.from_torch(cls)
        opt_state = tx.init(params)
        spec = lm.tree.structure(opt_state)
        for step in range(4):
            grads = {key: normal(p.shape, step) for key, p in params.items()}
            params, opt_state = tx.apply(grads, opt_state, params, donate=step % 2 == 1)
            assert lm.tree.structure(opt_state) == spec
            lm.checkpoint.save(tmp_path / str(step), opt_state)
            opt_state = lm.checkpoint.restore(tmp_path / str(step), tx.init(params))
            for key, p in theirs.items():
                p.grad = grads[key].clone()
            optimizer.step()
            assert all(torch.equal(params[key], p) for key, p in theirs.items())
    kept = lm.tree.leaves(opt_state.memory["w"])
    assert {leaf.dtype for leaf in kept} == {torch.uint8, torch.float32}
    assert all(type(leaf) is torch.Tensor for leaf in kept)


LAYOUTS = {
    "transposed": lambda shape, seed: normal((shape[3], *shape[1:3], shape[0]), seed).transpose(0, 3),
    "channels last": lambda shape, seed: normal(shape, seed).to(memory_format=torch.channels_last),
    "expanded": lambda shape, seed: normal(shape[1:], seed).expand(shape),
    "sliced": lambda shape, seed: normal((*shape[:3], 2 * shape[3]), seed)[..., ::2],
    "contiguous": lambda shape, seed: normal(shape, seed),
}


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_fused_optimizers_take_gradients_and_params_of_any_layout(cls):
    """A fused kernel walks memory; what it is given is laid out as autograd lays out `.grad`."""
    shape, base = (5, 3, 4, 6), torch.zeros(5, 3, 4, 12)
    fused, by_hand = optim.from_torch(cls, lr=0.1, fused=True), optim.from_torch(cls, lr=0.1, foreach=False)
    for layout in ("contiguous", "channels last", "transposed", "sliced"):
        for other in LAYOUTS:
            params = {"w": LAYOUTS[layout](shape, 0)}
            if layout == "sliced":  # in the memory of others, who keep theirs
                params = {"w": base.zero_()[..., ::2].copy_(params["w"])}
            plain = {"w": params["w"].clone().contiguous()}
            opt_state, plain_state = fused.init(params), by_hand.init(plain)
            for step in range(3):
                grads = {"w": LAYOUTS[other](shape, step + 1)}
                opt_state = lm.tree.map(
                    lambda x: x.clone(memory_format=torch.contiguous_format), opt_state
                )  # as loaded
                params, opt_state = fused.apply(grads, opt_state, params, donate=True)
                plain, plain_state = by_hand.apply({"w": grads["w"].contiguous()}, plain_state, plain)
            torch.testing.assert_close(params["w"], plain["w"], rtol=1e-5, atol=1e-6, msg=f"{layout}, {other}")
            assert not base[..., 1::2].any()


def test_a_fused_kernel_that_does_not_train_is_refused(monkeypatch):
    monkeypatch.setattr("lumen.optim._from_torch._works", {})
    params = {"w": torch.ones(64, dtype=torch.bfloat16)}
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *args, **kwargs: None)
    with pytest.raises(HyperparameterError, match=r"fused kernel of torch .*bfloat16 params on cpu.*fused=False"):
        optim.from_torch(torch.optim.SGD, lr=0.1, fused=True).init(params)
    tx = optim.from_torch(torch.optim.SGD, lr=0.1, fused=False)
    assert tx.apply(params, tx.init(params), params)[0]["w"].unique().item() == pytest.approx(0.9, abs=4e-3)
