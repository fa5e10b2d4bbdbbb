"""Fine-tune a small Llama by LoRA: from Python's standard library to another text, on bytes.

    python examples/finetune_lora.py                    # a few minutes on 2 cores
    python examples/finetune_lora.py --rank 16 --targets "*.q_proj" "*.k_proj" "*.v_proj" "*.o_proj"
    python examples/finetune_lora.py --qlora            # on a base in four bits; needs ".[quant]"
    torchrun --nproc-per-node=2 examples/finetune_lora.py --fsdp --qlora    # whose codes are sharded

Nothing is downloaded. A Llama built from its configuration first learns the sources of some Python modules, and is
saved as a directory that transformers reads, in place of a pretrained model from the hub. Then its weights are frozen,
and adapters of a few percent of their size learn English: the Zen of Python, and the topics of `help()`. The newest
checkpoint in --logdir contains only the adapters; --logdir/adapters has them in peft's files, and --logdir/tuned is a
directory for `AutoModelForCausalLM.from_pretrained`, with the adapters merged into the weights. Needs
`pip install ".[hf,examples]"`.

Expected: on the second text, the held-out loss decreases from about 2.45 to 2.20 nats per byte, with the adapters
alone.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import lumen as lm
from lumen.bridges import huggingface, lora

# B batch, T time.
MODULES = ("argparse", "ast", "calendar", "dataclasses", "functools", "inspect", "pathlib", "random", "typing")
TOKENIZER = ByT5Tokenizer()  # its tokens are bytes, so it needs no file


@dataclass
class Config:
    """Settings of the run."""

    pretrain_steps: int = 300
    steps: int = 200
    batch_size: int = 16
    context: int = 64
    layers: int = 2
    width: int = 128
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("*.q_proj", "*.v_proj", "*.up_proj", "*.down_proj")
    """Name patterns of the layers that get adapters."""
    fsdp: bool = False
    """Shard adapters and frozen weights over the processes that torchrun started."""
    qlora: bool = False
    """Keep the frozen weights of the blocks in NF4."""
    lr: float = 1e-2
    seed: int = 0
    logdir: Path = Path("runs/finetune_lora")


def sources() -> str:
    """The text of the first training: code."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return "".join((root / f"{name}.py").read_text() for name in MODULES if (root / f"{name}.py").exists())


def prose() -> str:
    """The text of the second training: English, from Python's own documentation."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    from pydoc_data.topics import topics

    return codecs.decode(this.s, "rot13") + "".join(topics[name] for name in sorted(topics))[:200_000]


def windows(text: str, context: int) -> Dataset:
    """Rows of `context` tokens."""
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return Dataset.from_dict({"input_ids": [ids[at : at + context] for at in range(0, len(ids) - context, context)]})


def collate(samples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch [B, T] whose targets are its own tokens; the model shifts them."""
    ids = torch.tensor([sample["input_ids"] for sample in samples])
    return {"input_ids": ids, "labels": ids}


def token_loss(state: lm.TrainState, params, batch) -> lm.Mean:
    """The model's own loss, as a sum and the number of tokens in it."""
    out, _ = state.apply(params, **batch, num_items_in_batch=1)
    return lm.Mean(out.loss, (batch["labels"][:, 1:] != -100).sum())


def step(state: lm.TrainState, batch: dict[str, Tensor]) -> tuple[lm.TrainState, dict[str, lm.Mean]]:
    """One update; for a model with adapters, `state.params` are the adapters."""
    loss, grads = lm.value_and_grad(lambda params, batch: token_loss(state, params, batch))(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def eval_step(state: lm.TrainState, batch: dict[str, Tensor]) -> dict[str, lm.Mean]:
    """The same loss on held-out text."""
    return {"loss": token_loss(state, state.params, batch)}


def optimizer(lr: float, steps: int) -> lm.optim.GradientTransformation:
    """AdamW with warmup and a cosine."""
    schedule = lm.optim.warmup_cosine(lr, warmup=max(steps // 20, 1), steps=steps)
    return lm.optim.chain(lm.optim.clip_by_global_norm(1.0), lm.optim.adamw(schedule, weight_decay=0.0))


def transforms(config: Config) -> list[lm.Transform]:
    """Those around the step."""
    return [*([lm.fsdp()] if config.fsdp else []), lm.donate()]


def pretrained(config: Config, path: Path) -> Path:
    """A model directory as on the hub, created locally."""
    sizes = {"hidden_size": config.width, "intermediate_size": 2 * config.width, "num_hidden_layers": config.layers}
    net = LlamaForCausalLM(
        LlamaConfig(
            **sizes, vocab_size=384, num_attention_heads=4, max_position_embeddings=config.context, use_cache=False
        )
    )
    state = lm.TrainState.create(net, optimizer(4e-3, config.pretrain_steps), seed=config.seed)
    data = lm.Loader(
        windows(sources(), config.context), batch_size=config.batch_size, seed=config.seed, collate=collate
    )
    runner = lm.Runner(step, transforms=transforms(config))
    state = runner.fit(state, data, until=lm.Steps(config.pretrain_steps)).export()
    if lm.rank() == 0:
        huggingface.save_pretrained(state, path)
    if lm.world_size() > 1:
        torch.distributed.barrier()
    return path


def main(config: Config) -> lm.Result:
    """Pretrain if necessary, adapt, save, and read back."""
    torch.manual_seed(config.seed)
    base = config.logdir / "base"
    net = LlamaForCausalLM.from_pretrained(base if base.exists() else pretrained(config, base))

    rows = windows(prose(), config.context)
    cut = len(rows) * 9 // 10
    adapted = lora.adapt(net, targets=config.targets, rank=config.rank, alpha=config.alpha)
    state = lm.TrainState.create(adapted, optimizer(config.lr, config.steps), seed=config.seed)
    trainable, frozen = (sum(t.numel() for t in tensors.values()) for tensors in (state.params, state.buffers))
    print(f"{trainable:,} numbers are trained beside {frozen:,} that stay")
    if config.qlora:
        state = lm.quantize(state, "nf4", layers="*.layers.*")
    held_out = lm.Loader(rows.select(range(cut, len(rows))), batch_size=64, shuffle=False, collate=collate)
    runner = lm.Runner(
        step,
        transforms=transforms(config),
        checkpoint=lm.Checkpointer(config.logdir, every=lm.Every(steps=config.steps), frozen=False),
        sinks=[lm.sinks.TensorBoard(config.logdir), lm.sinks.JSONL(config.logdir / "metrics.jsonl")],
    )
    before = float(lm.evaluate(eval_step, state, held_out)["loss"])
    result = runner.fit(
        state,
        lm.Loader(rows.select(range(cut)), batch_size=config.batch_size, seed=config.seed, collate=collate),
        until=lm.Steps(config.steps),
        validate=lm.Validate(eval_step, held_out, every=lm.Every(steps=max(config.steps // 4, 1))),
        resume="auto",
    )
    print(f"held-out loss {before:.3f} before, {result.metrics['val/loss']:.3f} nats per byte after")
    state = result.export()
    if lm.rank() > 0:
        return result
    tuned, adapters = config.logdir / "tuned", config.logdir / "adapters"
    if not tuned.exists():
        huggingface.save_pretrained(state, tuned)
        huggingface.save_adapters(state, adapters, base=str(base))
    prompt = TOKENIZER("The ", add_special_tokens=False, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(tuned)
    said = model.generate(**prompt, max_new_tokens=config.context - 8, do_sample=True, top_k=10, pad_token_id=0)
    print(TOKENIZER.decode(said[0], skip_special_tokens=True))
    return result


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
