"""Hugging Face's directories, generation, and adapters: what goes out is what was trained."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import lumen as lm
from lumen.bridges import huggingface, lora

hf = pytest.importorskip("transformers")

from tests.parity.hf_models import batches, bert, gpt2, llama, masked, resnet, text, vit  # noqa: E402

ADAM = lm.optim.adamw(1e-2)


def make_state(net, tx=ADAM):
    return lm.TrainState.create(net, tx)


def step(state, batch):
    def loss_fn(params, batch):
        return state.apply(params, **batch)[0].loss

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def trained(state, count=3, make=text):
    for batch in batches(make, count):
        state, _ = step(state, batch)
    return state


def tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


# ------------------------------------------------------------------------------------------------ module


@pytest.mark.parametrize("make", [gpt2, llama])
def test_generation_with_the_states_params(make):
    net = make()
    state = trained(make_state(net))
    bound = lm.bridges.module(state)
    assert not bound.training
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    found = bound.generate(prompt, **options)
    net.load_state_dict({name: p.clone() for name, p in state.params.items()}, strict=False)
    if make is gpt2:
        assert bound.lm_head.weight is bound.transformer.wte.weight
    assert torch.equal(found, net.eval().generate(prompt, **options))
    # A second way: each next token by the state's own function, without a cache.
    tokens, evaluated = prompt, state.eval()
    for _ in range(8):
        logits = evaluated.apply(state.params, input_ids=tokens)[0].logits[:, -1]
        logits[:, 2] = -torch.inf  # as `min_new_tokens` forbids the end
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, tokens)


def test_a_module_shares_the_states_memory_and_wants_no_gradient():
    state = make_state(resnet())
    bound = lm.bridges.module(state)
    held = {**state.params, **state.buffers}
    assert {name: t.data_ptr() for name, t in tensors(bound).items()} == {n: t.data_ptr() for n, t in held.items()}
    assert not any(p.requires_grad for p in bound.parameters())


def test_a_module_of_parts_is_refused():
    state = make_state(nn.Linear(4, 2))
    cut = state.replace(params={**state.params, "weight": state.params["weight"][:1]})
    with pytest.raises(lm.LumenError, match=r"'weight' has the shape \(2, 4\), and the state has .* \(1, 4\).*export"):
        lm.bridges.module(cut)


# ------------------------------------------------------------------------------------------------ directories


MAKERS = [gpt2, llama, bert, vit, resnet]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("shards", ["50GB", 20_000], ids=["whole", "shards"])
def test_a_directory_is_read_back_bitwise(make, shards, tmp_path):
    state = make_state(make())
    path = huggingface.save_pretrained(state, tmp_path / "saved", max_shard_size=shards)
    assert (path / "model.safetensors.index.json").exists() == (shards != "50GB")
    again = type(state.apply_fn.module).from_pretrained(path)
    held = {**state.params, **state.buffers}
    assert tensors(again).keys() == held.keys()
    assert all(torch.equal(t, held[name]) for name, t in tensors(again).items())
    torch.manual_seed(1)
    other = make_state(make())
    assert not all(torch.equal(p, state.params[name]) for name, p in other.params.items())
    filled = huggingface.load_pretrained(other, path)
    assert list(filled.params) == list(state.params)
    assert lm.tree.structure(filled.params) == lm.tree.structure(state.params)
    assert all(torch.equal(p, filled.params[name]) for name, p in state.params.items())
    assert all(torch.equal(b, filled.buffers[name]) for name, b in state.buffers.items())
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"], "nothing is left beside"


def test_auto_model_reads_it_with_the_hubs_names(tmp_path):
    state = trained(make_state(gpt2()))
    path = huggingface.save_pretrained(state, tmp_path / "saved")
    again = hf.AutoModelForCausalLM.from_pretrained(path)
    assert type(again) is hf.GPT2LMHeadModel
    with safe_open(path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == set(state.params), "of tied weights one is written"
    assert "lm_head.weight" not in names
    assert json.loads((path / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(again(ids).logits, state.eval().apply(state.params, ids)[0].logits)


def test_an_export_of_a_checkpoint_is_a_file_of_the_hub(tmp_path):
    state = trained(make_state(gpt2()))
    lm.checkpoint.save(tmp_path / "checkpoint", state)
    (tmp_path / "hub").mkdir()
    lm.checkpoint.export(tmp_path / "checkpoint", tmp_path / "hub/model.safetensors")
    state.apply_fn.module.config.save_pretrained(tmp_path / "hub")
    again = hf.GPT2LMHeadModel.from_pretrained(tmp_path / "hub")
    assert all(torch.equal(p, state.params[name]) for name, p in again.named_parameters())


def test_a_base_model_fills_one_with_a_head(tmp_path):
    whole = make_state(gpt2())
    base = lm.TrainState.create(hf.GPT2Model(whole.apply_fn.module.config), ADAM)
    path = huggingface.save_pretrained(base, tmp_path / "base")
    filled = huggingface.load_pretrained(whole, path)  # its head is tied, so nothing is missing
    assert all(torch.equal(filled.params[f"transformer.{name}"], p) for name, p in base.params.items())


def test_a_half_precision_file_arrives_in_the_states_dtype(tmp_path):
    net = gpt2().to(torch.bfloat16)
    path = huggingface.save_pretrained(make_state(net), tmp_path / "half")
    filled = huggingface.load_pretrained(make_state(gpt2().double()), path)
    assert {p.dtype for p in filled.params.values()} == {torch.float64}
    assert torch.equal(filled.params["transformer.wte.weight"], net.transformer.wte.weight.detach().double())


def test_what_does_not_fit_is_listed(tmp_path):
    path = huggingface.save_pretrained(make_state(gpt2()), tmp_path / "saved")
    with pytest.raises(lm.LumenError, match=r"of another shape transformer\.wpe\.weight \(32, 32\), not \(48, 32\)"):
        huggingface.load_pretrained(make_state(gpt2(n_positions=48)), path)
    deep = make_state(gpt2(n_layer=3))
    with pytest.raises(lm.LumenError, match=r"missing transformer\.h\.2\.[\s\S]*and 6 more[\s\S]*strict=False"):
        huggingface.load_pretrained(deep, path)
    with pytest.raises(lm.LumenError, match=r"unexpected transformer\.h\.1\."):
        huggingface.load_pretrained(make_state(gpt2(n_layer=1)), path)
    filled = huggingface.load_pretrained(deep, path, strict=False)
    own = {name for name in deep.params if torch.equal(deep.params[name], filled.params[name])}
    assert all(name in own for name in deep.params if ".h.2." in name), "what the file lacks stays"
    assert "transformer.wte.weight" not in own


def test_refusals(tmp_path):
    state = make_state(gpt2())
    (tmp_path / "there").mkdir()
    with pytest.raises(lm.LumenError, match="already exists"):
        huggingface.save_pretrained(state, tmp_path / "there")
    plain = make_state(nn.Linear(2, 2))
    with pytest.raises(lm.LumenError, match="Linear is not a transformers model"):
        huggingface.save_pretrained(plain, tmp_path / "plain")
    with pytest.raises(lm.LumenError, match="Linear is not a transformers model"):
        huggingface.load_pretrained(plain, tmp_path / "there")
    with pytest.raises(lm.LumenError, match="could not be read as a GPT2LMHeadModel"):
        huggingface.load_pretrained(state, tmp_path / "there")
    with pytest.raises(lm.LumenError, match=r"initialized by ema.*Load first"):
        huggingface.load_pretrained(lm.ema(0.9).init(state), tmp_path / "there")
    (tmp_path / "file").write_text("")
    with pytest.raises(lm.LumenError, match="could not be written"):
        huggingface.save_pretrained(state, tmp_path / "file/below")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "there"]


# ------------------------------------------------------------------------------------------------ adapters


CASES = [(gpt2, ["*.c_attn", "*.c_proj"], 6, text), (llama, "*.[qv]_proj", 4, text), (bert, "*.query", 2, masked)]


@pytest.mark.parametrize(("make", "targets", "layers", "rows"), CASES, ids=["gpt2", "llama", "bert"])
def test_merged_is_adapted(make, targets, layers, rows):
    net = make().double()
    before = {name: t.clone() for name, t in tensors(net).items()}
    adapted = lora.adapt(net, targets=targets, rank=4, alpha=8)
    state = make_state(adapted)
    assert len(state.params) == 2 * layers
    assert all(name.endswith(("lora_a", "lora_b")) for name in state.params)
    assert set(before) <= set(state.buffers)
    batch = batches(rows, 1)[0]
    begun = state.eval().apply(state.params, **batch)[0].logits
    assert torch.equal(begun, net.eval()(**batch).logits), "B = 0 changes nothing"
    state = trained(state, 5, rows)
    now = state.eval().apply(state.params, **batch)[0].logits
    assert float((now - begun).abs().max()) > 1e-5
    merged = lora.merged(state)
    assert type(merged) is type(net)
    assert {type(m) for m in merged.modules()} == {type(m) for m in net.modules()}
    assert tensors(merged).keys() == before.keys()
    # transformers normalizes in float32 whatever the dtype is, so 1e-10 holds where it does not.
    assert float((merged(**batch).logits - now).abs().max()) < (1e-5 if make is llama else 1e-10)
    changed = {name for name, t in tensors(merged).items() if not torch.equal(t, before[name])}
    assert len(changed) == layers
    assert all(torch.equal(t, before[name]) for name, t in tensors(net).items()), "the given net is left as it is"
    assert all(p.requires_grad for p in net.parameters())


def test_adapted_is_what_the_formula_says():
    net = nn.Sequential(nn.Linear(5, 3)).double()
    state = make_state(lora.adapt(net, targets="0", rank=2, alpha=3))
    a, b = torch.randn(2, 5).double(), torch.randn(3, 2).double()
    x = torch.randn(4, 5).double()
    out, _ = state.apply({"0.lora_a": a, "0.lora_b": b}, x)
    wanted = x @ (net[0].weight + 1.5 * b @ a).T + net[0].bias
    wanted = wanted.detach()
    assert float((out - wanted).abs().max()) < 1e-12


@pytest.mark.parametrize(
    "transform", [lm.accumulate(2), lm.remat(), lm.donate(), lm.ema(0.9), lm.compile(backend="eager")], ids=repr
)
def test_transforms_keep_their_law_on_adapters(transform):
    state = make_state(lora.adapt(llama().double(), targets="*.[qv]_proj", rank=2), lm.optim.adamw(1e-2, eps=1e-4))
    wrapped = transform(step)
    found, wanted = wrapped.init(state), state
    batch = {name: t[1:] for name, t in batches(text, 1)[0].items()}  # rows of equally many tokens
    for _ in range(3):
        wanted, loss = step(wanted, batch)
        found, other = wrapped(found, batch)
    assert abs(float(loss["loss"] - other["loss"])) < 1e-6
    assert max(float((found.params[name] - p).abs().max()) for name, p in wanted.params.items()) < 1e-6


def test_a_head_beside_the_adapters_is_trained_whole(tmp_path):
    net = vit()
    state = make_state(lora.adapt(net, targets="*.q_proj", also="classifier.*", rank=2))
    assert {"classifier.weight", "classifier.bias"} < set(state.params)
    assert len(state.params) == 2 + 2 * 2


def test_a_directory_of_an_adapted_model_holds_merged_weights(tmp_path):
    base = gpt2()
    clean = huggingface.save_pretrained(make_state(base), tmp_path / "base")
    state = trained(make_state(lora.adapt(base, targets="*.c_attn")))
    path = huggingface.save_pretrained(state, tmp_path / "tuned")
    again = hf.AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([[3, 4, 5, 6]])
    wanted = state.eval().apply(state.params, ids)[0].logits
    assert float((again(ids).logits - wanted).detach().abs().max()) < 1e-5
    assert float((base.eval()(ids).logits - wanted).detach().abs().max()) > 1e-3
    # Published weights go under adapters, which stay.
    torch.manual_seed(5)
    other = make_state(lora.adapt(gpt2(), targets="*.c_attn"))
    filled = huggingface.load_pretrained(other, clean)
    assert torch.equal(filled.buffers["transformer.wte.weight"], base.transformer.wte.weight)
    assert all(filled.params[name] is p for name, p in other.params.items())


def test_adapters_beside_half_precision_are_float32():
    state = make_state(lora.adapt(llama().to(torch.bfloat16), targets="*.q_proj"))
    assert {p.dtype for p in state.params.values()} == {torch.float32}
    state = trained(state)
    assert {p.dtype for p in state.params.values()} == {torch.float32}
    assert lora.merged(state).lm_head.weight.dtype == torch.bfloat16
    assert lora.merged(state).model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


def test_adapter_refusals():
    net = gpt2()
    with pytest.raises(lm.LumenError, match=r"pattern '\*\.query' matches none of the .* layer names"):
        lora.adapt(net, targets="*.query")
    with pytest.raises(lm.LumenError, match=r"'transformer.ln_f' is a LayerNorm; .*also='transformer.ln_f\.\*'"):
        lora.adapt(net, targets="transformer.ln_f")
    with pytest.raises(lm.LumenError, match=r"weight of 'lm_head' is tied"):
        lora.adapt(net, targets="lm_head")
    with pytest.raises(lm.LumenError, match=r"'transformer.h.0.attn.c_attn' is a LoraConv1D.*once"):
        lora.adapt(lora.adapt(net, targets="*.c_attn"), targets="*.c_attn")
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}):
        with pytest.raises(lm.LumenError, match="rank of at least 1"):
            lora.adapt(net, targets="*.c_attn", **wrong)
    assert lora.adapt(llama(), targets="lm_head").lm_head.lora_a.shape == (8, 32), "an untied head takes adapters"


# ------------------------------------------------------------------------------------------------ checkpoints


def fit(state, directory, steps, resume="never", **options):
    data = lm.Loader({k: torch.cat([b[k] for b in batches(text, 8)]) for k in batches(text, 1)[0]}, batch_size=4)
    checkpoint = lm.Checkpointer(directory, every=lm.Every(steps=3), **options)
    runner = lm.Runner(step, checkpoint=checkpoint, progress=False)
    torch.manual_seed(4)
    return runner.fit(state, data, until=lm.Steps(steps), resume=resume).state, checkpoint


def size(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_checkpoints_without_frozen_weights(tmp_path):
    make = lambda: make_state(lora.adapt(gpt2(n_embd=128), targets="*.c_attn", rank=2))  # noqa: E731
    torch.manual_seed(0)
    state = make()
    whole, first = fit(state, tmp_path / "whole", 9)
    part, saved = fit(state, tmp_path / "part", 5, frozen=False)
    assert size(saved.latest()) < size(first.latest()) / 10
    torch.manual_seed(0)
    found, saved = fit(make(), tmp_path / "part", 9, resume="auto", frozen=False)
    assert int(found.step) == 9
    assert all(torch.equal(p, found.params[name]) for name, p in whole.params.items())
    assert all(torch.equal(b, found.buffers[name]) for name, b in whole.buffers.items())
    assert list(found.buffers) == list(whole.buffers)
    with pytest.warns(lm.InexactWarning, match="buffers/transformer.wte.weight"):
        again = lm.checkpoint.restore(saved.latest(), state, strict=False)
    assert all(torch.equal(p, again.params[name]) for name, p in whole.params.items())
    torch.manual_seed(9)
    with pytest.raises(lm.LumenError, match="saved without its frozen params, and those of this run are different"):
        fit(make(), tmp_path / "part", 12, resume="auto", frozen=False)


def test_checkpoints_without_frozen_weights_need_them_whole(tmp_path):
    with pytest.raises(lm.LumenError, match=r"needs frozen params whose sharding is known, and 'transformer.wpe"):
        state = make_state(lora.adapt(gpt2(), targets="*.c_attn", rank=2))
        cut = {name: b[:1] if name.endswith("wpe.weight") else b for name, b in state.buffers.items()}
        fit(state.replace(buffers=cut), tmp_path, 5, frozen=False)


# ------------------------------------------------------------------------------------------------ peft


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_model_of_peft_works_as_it_is(tmp_path):
    peft = pytest.importorskip("peft")
    import copy

    base = llama().double()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    wrapped = peft.get_peft_model(copy.deepcopy(base), config)
    state = make_state(wrapped)
    assert len(state.params) == 2 * 4
    assert all("lora_" in name for name in state.params)
    # The same numbers as the own adapters, begun alike.
    own = make_state(lora.adapt(base, targets="*.[qv]_proj", rank=4, alpha=8))
    names = {
        name: "base_model.model."
        + name.replace("lora_a", "lora_A.default.weight").replace("lora_b", "lora_B.default.weight")
        for name in own.params
    }
    own = own.replace(params={name: state.params[other] for name, other in names.items()})
    for batch in batches(text, 4):
        (state, loss), (own, other) = step(state, batch), step(own, batch)
        assert abs(float(loss["loss"] - other["loss"])) < 1e-6
    assert max(float((own.params[a] - state.params[b]).abs().max()) for a, b in names.items()) < 1e-6
    path = huggingface.save_pretrained(state, tmp_path / "adapters")
    assert (path / "adapter_model.safetensors").exists()
    ids = torch.tensor([[3, 4, 5, 6]])
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), path)
    assert torch.equal(again.eval()(ids).logits, state.eval().apply(state.params, ids)[0].logits)
    with pytest.raises(lm.LumenError, match="not a transformers model"):
        huggingface.load_pretrained(state, path)
