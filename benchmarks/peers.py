"""Raw loops and other libraries, each as its own documentation writes it, with logging and checkpoints off."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tasks import DISTINCT, LEARNING_RATE, NO_BOUND, WEIGHT_DECAY, Batch, Task, loss_of
from benchmarks.timing import Marked, Measure, Run, Variant, looped


def adamw(net: nn.Module, **kwargs: Any) -> torch.optim.AdamW:
    """The optimizer of every variant."""
    return torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, **kwargs)


def raw(compiled: bool = False, clip: float | None = None, **options: Any) -> Callable[[Task], Measure]:
    """A loop in plain PyTorch."""

    def build(task: Task) -> Measure:
        net = task.fresh()
        start = {name: value.clone() for name, value in net.state_dict().items()}
        model = torch.compile(net) if compiled else net

        def fresh() -> Run:
            net.load_state_dict(start)
            optimizer = adamw(net, **options)

            def run(batches: list[Batch]) -> Tensor:
                for x, y in batches:
                    optimizer.zero_grad()
                    loss = loss_of(model(x), y)
                    loss.backward()
                    if clip is not None:
                        torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
                    optimizer.step()
                return loss

            return run

        return looped(task, fresh)

    return build


def fabric(task: Task) -> Measure:
    """Lightning Fabric."""
    from lightning.fabric import Fabric

    hush()
    driver = Fabric(accelerator="cpu", devices=1)
    driver.launch()

    def fresh() -> Run:
        net = task.fresh()
        model, optimizer = driver.setup(net, adamw(net, fused=True))

        def run(batches: list[Batch]) -> Tensor:
            for x, y in batches:
                optimizer.zero_grad()
                loss = loss_of(model(x), y)
                driver.backward(loss)
                optimizer.step()
            return loss

        return run

    return looped(task, fresh)


def accelerate(task: Task) -> Measure:
    """Hugging Face Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)

    def fresh() -> Run:
        accelerator.free_memory()
        net = task.fresh()
        model, optimizer = accelerator.prepare(net, adamw(net, fused=True))

        def run(batches: list[Batch]) -> Tensor:
            for x, y in batches:
                optimizer.zero_grad()
                loss = loss_of(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
            return loss

        return run

    return looped(task, fresh)


def lightning_module() -> type[Any]:
    """A `LightningModule` of a task, without its steps; imports Lightning."""
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self, task: Task) -> None:
            super().__init__()
            self.net = task.fresh()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.net, fused=True)

    return Module


def lightning(logs: bool) -> Callable[[Task], Measure]:
    """Lightning's Trainer; with `logs`, one `self.log` at each step and a CSV row every 50."""

    def build(task: Task) -> Measure:
        import lightning as L
        from lightning.pytorch.loggers import CSVLogger

        hush()

        class Module(lightning_module()):  # type: ignore[misc]
            def training_step(self, batch: Batch, _index: int) -> Tensor:
                x, y = batch
                loss = loss_of(self.net(x), y)
                if logs:
                    self.log("loss", loss)
                return loss

        class Clock(L.Callback):
            def __init__(self, first: int, last: int) -> None:
                self.first, self.last = first, last
                self.marks: list[float] = []

            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
                if batch_idx in (self.first, self.last):
                    self.marks.append(time.perf_counter())

        def measure(steps: int) -> float:
            data = Marked(task, steps)
            clock = Clock(data.lead - 1, data.lead + steps - 1)
            with tempfile.TemporaryDirectory() as folder:
                trainer = L.Trainer(
                    accelerator="cpu",
                    devices=1,
                    max_epochs=1,
                    logger=CSVLogger(folder) if logs else False,
                    log_every_n_steps=50,
                    callbacks=[clock],
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                )
                trainer.fit(Module(task), data)
            start, end = clock.marks
            return (end - start) / steps

        return measure

    return build


def torchopt(task: Task) -> Measure:
    """TorchOpt: its functional AdamW over the module as a function, in place."""
    import torchopt

    net = task.fresh()
    start = {name: value.detach().clone() for name, value in net.named_parameters()}
    tx = torchopt.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def fresh() -> Run:
        params = {name: value.clone().requires_grad_() for name, value in start.items()}
        memory = tx.init(params)

        def run(batches: list[Batch]) -> Tensor:
            nonlocal params, memory
            for x, y in batches:
                loss = loss_of(torch.func.functional_call(net, params, (x,)), y)
                grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
                updates, memory = tx.update(grads, memory, params=params, inplace=True)
                params = torchopt.apply_updates(params, updates, inplace=True)
            return loss

        return run

    return looped(task, fresh)


def jax(task: Task) -> Measure:
    """JAX: one jitted step with a donated state, and optax."""
    import jax
    import jax.numpy as jnp
    import optax

    forward = _jax_mlp if task.name == "mlp" else _jax_gpt
    weights = {
        name: value.detach().numpy().T
        if name.endswith("weight") and value.ndim == 2 and "embed" not in name
        else value.detach().numpy()
        for name, value in task.fresh().named_parameters()
    }
    tx = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def step(params: Any, memory: Any, x: Any, y: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            logits = forward(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, memory = tx.update(grads, memory, params)
        return optax.apply_updates(params, updates), memory, loss

    jitted = jax.jit(step, donate_argnums=(0, 1))

    def fresh() -> Run:
        params = {name: jnp.array(value) for name, value in weights.items()}
        memory = tx.init(params)

        def run(batches: list[Any]) -> Any:
            nonlocal params, memory
            for x, y in batches:
                params, memory, loss = jitted(params, memory, x, y)
            return jax.block_until_ready((params, memory, loss))[2]

        return run

    return looped(task, fresh, lambda batches: [(jnp.array(x.numpy()), jnp.array(y.numpy())) for x, y in batches])


def _jax_mlp(params: Any, x: Any) -> Any:
    import jax

    for name in ("0", "2"):
        x = jax.nn.relu(x @ params[f"{name}.weight"] + params[f"{name}.bias"])
    return x @ params["4.weight"] + params["4.bias"]


def _jax_gpt(params: Any, x: Any) -> Any:
    import jax

    def linear(name: str, x: Any) -> Any:
        return x @ params[f"{name}.weight"] + params[f"{name}.bias"]

    def norm(name: str, x: Any) -> Any:
        centered = x - x.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
        return centered * scale * params[f"{name}.weight"] + params[f"{name}.bias"]

    x = params["embed.weight"][x] + params["place"]
    for i in range(4):
        block = f"blocks.{i}"
        qkv = linear(f"{block}.qkv", norm(f"{block}.norm1", x)).reshape(*x.shape[:2], 3, 4, -1)
        attended = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True)
        x = x + linear(f"{block}.out", attended.reshape(x.shape))
        up = jax.nn.gelu(linear(f"{block}.up", norm(f"{block}.norm2", x)), approximate=False)
        x = x + linear(f"{block}.down", up)
    return linear("head", norm("norm", x))


def hush() -> None:
    """Suppress the warnings and messages of Lightning."""
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


VARIANTS = [
    Variant("raw", "raw loop, AdamW(fused)", raw(fused=True)),
    Variant("raw-clip", "raw loop, AdamW(fused), clip_grad_norm_", raw(clip=NO_BOUND, fused=True)),
    Variant("raw-foreach", "raw loop, AdamW(foreach)", raw(foreach=True)),
    Variant("raw-compile", "raw loop, torch.compile(model), AdamW(fused)", raw(compiled=True, fused=True)),
    Variant("fabric", "Lightning Fabric", fabric),
    Variant("accelerate", "Accelerate", accelerate),
    Variant("lightning", "Lightning Trainer", lightning(logs=False)),
    Variant("lightning-log", "Lightning Trainer, one self.log per step", lightning(logs=True)),
    Variant("torchopt", "TorchOpt", torchopt),
    Variant("jax", "JAX jit + optax", jax),
]
assert DISTINCT % 8 == 0
