"""Twenty-two families of transformers at toy size, and what each transform makes of them beside a raw loop.

`python -m tests.parity.hf_families` prints the table of `docs/huggingface.md`.
"""

from __future__ import annotations

import sys
import warnings

import torch
import torch.nn.functional as F
import transformers as hf

import lumen as lm
from lumen.core import distributed

ROWS, TIME, STEPS, LR = 7, 8, 2, 0.05
SHARDS, MICROBATCHES = (4, 3), (3, 2, 2)  # rows of each process and of each microbatch
TOLERANCE = {"bf16": 0.05}  # of params and losses in float32: absolute, to a raw loop in float32
DEFAULT_TOLERANCE = 2e-5

_TEXT = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_SHORT = {"max_position_embeddings": 16}
_ENCODER = {**_TEXT, **_SIZES, "max_position_embeddings": 20}
_DECODER = {**_TEXT, **_SIZES, **_SHORT}
_GROUPED = {**_DECODER, "num_key_value_heads": 1, "head_dim": 8}
_PICTURE = {"image_size": 8, "patch_size": 4, "num_labels": 5}
_SEQ2SEQ = {
    **_TEXT,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 1,
}

# The configuration's class, the model's class, the sizes, the kind of batch.
FAMILIES = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {**_TEXT, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
        "causal",
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _DECODER, "causal"),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            **_TEXT,
            **_SHORT,
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 16,
        },
        "causal",
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {**_TEXT, "hidden_size": 16, "n_layer": 2, "n_head": 2}, "causal"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED, "causal"),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_GROUPED, "sliding_window": 4}, "causal"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GROUPED, "causal"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_GROUPED, "sliding_window": 4}, "causal"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_DECODER, "num_key_value_heads": 2}, "causal"),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        "causal",
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            **_DECODER,
            "num_key_value_heads": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
        "causal",
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**_TEXT, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
        "seq2seq",
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", {**_SEQ2SEQ, **_SHORT}, "seq2seq"),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {**_SEQ2SEQ, "num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 16},
        "speech",
    ),
    "bert": ("BertConfig", "BertForMaskedLM", _ENCODER, "masked"),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _ENCODER, "masked"),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {**_TEXT, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 16},
        "masked",
    ),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", {**_ENCODER, "embedding_size": 8}, "masked"),
    "deberta_v2": (
        "DebertaV2Config",
        "DebertaV2ForMaskedLM",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        "masked",
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", {**_SIZES, **_PICTURE}, "pictures"),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {
            "image_size": 8,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 2,
            "num_labels": 5,
        },
        "pictures",
    ),
    "resnet": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5, "layer_type": "basic"},
        "pictures",
    ),
}

COLUMNS = {
    "plain": (),
    "accumulate(3)": (lambda: lm.accumulate(3),),
    "compile": (lambda: lm.compile(backend="eager"),),
    "blocks": (lambda: lm.compile(backend="eager", blocks=True),),
    "remat": (lm.remat,),
    "donate": (lm.donate,),
    "bf16": (lambda: lm.precision("bf16"),),
    "ema": (lambda: lm.ema(0.9),),
    "ensemble(2)": (lambda: lm.ensemble(2),),
    "fsdp": (),  # on two processes
}

REFUSED = {"bloom": ("ensemble(2)",)}  # its activation is an autograd function that vmap cannot map


def make_net(family):
    """The model, without dropout: its draws depend on how rows are split."""
    config_class, model_class, sizes, _ = FAMILIES[family]
    config = getattr(hf, config_class)(**sizes)
    for name, value in vars(config).items():
        if any(word in name for word in ("drop", "pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    return getattr(hf, model_class)(config).train()


def batches(family, count=STEPS):
    """Batches whose rows have very different numbers of labels."""
    kind = FAMILIES[family][3]
    generator = torch.Generator().manual_seed(7)

    def batch():
        if kind == "pictures":
            values = torch.randn(ROWS, 3, 8, 8, generator=generator)
            labels = torch.randint(5, (ROWS,), generator=generator)
            labels[1] = labels[6] = -100
            return {"pixel_values": values, "labels": labels}
        ids = torch.randint(3, 32, (ROWS, TIME), generator=generator)
        lengths = torch.tensor([8, 3, 6, 4, 8, 3, 7])
        mask = (torch.arange(TIME) < lengths[:, None]).long()
        labels = ids.masked_fill(mask == 0, -100)
        if kind == "masked":
            labels[:, 2:] = labels[:, 2:].masked_fill(torch.rand(ROWS, TIME - 2, generator=generator) < 0.6, -100)
        if kind == "speech":
            return {"input_features": torch.randn(ROWS, 4, 12, generator=generator), "labels": labels}
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return [batch() for _ in range(count)]


def losses_of(family, apply, batch):
    """The loss of each label, and which labels count."""
    kind = FAMILIES[family][3]
    inputs = batch if kind in ("seq2seq", "speech") else {k: v for k, v in batch.items() if k != "labels"}
    logits, labels = apply(**inputs).logits, batch["labels"]
    if kind == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="none")
    return each, (labels != -100).flatten()


def step_of(family):
    """The step that a user would write."""

    def step(state, batch):
        def loss_fn(params, batch):
            seen = {}

            def apply(**inputs):
                out, seen["buffers"] = state.apply(params, **inputs)
                return out

            each, counts = losses_of(family, apply, batch)
            return lm.Mean.of(each, counts), lm.Aux(buffers=seen["buffers"])

        (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}

    return step


def raw(family, parts=(ROWS,)):
    """Losses, params and their average (decay 0.9) of a raw loop that adds the gradients of `parts` of each batch."""
    net = make_net(family)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    losses, average = [], {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    for batch in batches(family):
        split = {name: leaf.split(list(parts)) for name, leaf in batch.items()}
        found = [losses_of(family, net, {name: pieces[i] for name, pieces in split.items()}) for i in range(len(parts))]
        tokens = sum(counts.sum() for _, counts in found)
        loss = sum(each.sum() for each, _ in found) / tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        for name, p in net.named_parameters():
            if p.requires_grad:
                average[name].mul_(0.9).add_(p.detach(), alpha=0.1)
    return torch.stack(losses), {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}, average


def lumen(family, column):
    """Losses and params of the same run by Lumen: a list of lanes under `ensemble`, and the average under `ema`."""
    transforms = [make() for make in COLUMNS[column]]
    if column == "fsdp":
        transforms = [lm.fsdp(lm.mesh(shard=2, device="cpu"))]
    wrapped = lm.compose(*transforms)(step_of(family))
    state = wrapped.init(lm.TrainState.create(make_net(family), lm.optim.sgd(LR)))
    losses = []
    for batch in batches(family):
        if column == "fsdp":
            batch = {name: leaf.split(SHARDS)[distributed.rank()] for name, leaf in batch.items()}
        state, metrics = wrapped(state, batch)
        losses.append(metrics["loss"].compute())
    losses = torch.stack(losses)
    average = lm.ema.params(state) if column == "ema" else None
    states = wrapped.export(state)
    lanes = states if isinstance(states, list) else [states]
    return [(losses[:, i] if losses.ndim > 1 else losses, lane.params) for i, lane in enumerate(lanes)], average


def gap(family, column):
    """How far Lumen is from the raw loop: the largest absolute difference of any loss or param."""
    parts = {"accumulate(3)": MICROBATCHES, "fsdp": SHARDS}.get(column, (ROWS,))
    wanted, params, averaged = raw(family, parts)
    lanes, average = lumen(family, column)
    gaps = [float((average[name] - averaged[name]).abs().max()) for name in average] if average else []
    for losses, found in lanes:
        assert found.keys() == params.keys()
        gaps += [float((losses - wanted).abs().max())]
        gaps += [float((found[name] - param).abs().max()) for name, param in params.items()]
    return max(gaps)


def cell(family, column):
    """`equal`, `uncompiled: why` or `refused: why`; any other error is raised."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            distance = gap(family, column)
        except lm.LumenError as error:
            return f"refused: {type(error).__name__}: {error}"
    assert distance <= TOLERANCE.get(column, DEFAULT_TOLERANCE), (family, column, distance)
    uncompiled = [str(w.message) for w in caught if issubclass(w.category, lm.GraphBreakWarning)]
    return f"uncompiled: {uncompiled[0]}" if uncompiled else "equal"


def table():
    """The table of the page, from what is refused."""
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---{'|---' * len(COLUMNS)}|"]
    for family in FAMILIES:
        marks = ["refused" if column in REFUSED.get(family, ()) else "=" for column in COLUMNS]
        lines.append(f"| {family} | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
