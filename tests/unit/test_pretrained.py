"""Published weights into a state on the meta device, in one process: names, shapes, dtypes, and what no file has."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import lumen as lm
from lumen.bridges import huggingface
from lumen.bridges._weight_files import WeightFiles
from lumen.bridges._weight_names import recipes
from lumen.core.sharding import LeafSpec, rows_spec
from lumen.errors import (
    CheckpointError,
    CheckpointFormatError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    ParamsError,
    PatternError,
    StateError,
)
from lumen.parallel.tensor.layout import shard_spec

hf = pytest.importorskip("transformers")

from tests.distributed.pretrained_models import MODELS, differing, on_meta, state_of, tensors  # noqa: E402


def identity(state, batch):
    return state, {}


plain = lm.compose()(identity)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A directory with new weights for each model."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(11)
    for name, make in MODELS.items():
        make().save_pretrained(root / name, max_shard_size="20KB")
    return root


# ------------------------------------------------------------------------------------------------ the law


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_bitwise_from_pretrained(name, dtype, directories):
    net = on_meta(name, dtype)
    state = plain.init(huggingface.load_pretrained(state_of(net), directories / name))
    assert differing(state, tensors(type(net).from_pretrained(directories / name, dtype=dtype))) == []
    assert state.slots == {}
    assert not any(x.is_meta for x in lm.tree.tensors(state))


class Rope(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 4))
        self.other = nn.Linear(4, 3)
        self.tied = nn.Linear(4, 6, bias=False)
        self.tied.weight = self.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("angles", torch.ones(3), persistent=False)

    def reset_parameters(self):
        nn.init.normal_(self.weight)
        self.angles.copy_(torch.arange(3.0))


def rope_directory(path, **changes):
    weights = {"weight": torch.randn(6, 4), "other.weight": torch.randn(3, 4), "other.bias": torch.randn(3)}
    weights |= {"count": torch.tensor(7), **changes}
    path.mkdir(exist_ok=True)
    save_file({name: x for name, x in weights.items() if x is not None}, path / "model.safetensors")
    return path


def rope(kind=Rope):
    with torch.device("meta"):
        return state_of(kind())


def test_a_module_of_torch_has_the_names_of_its_state_dict(tmp_path):
    path = rope_directory(tmp_path / "rope")
    state = plain.init(huggingface.load_pretrained(rope(), path))
    wanted = load_file(path / "model.safetensors")
    assert all(torch.equal({**state.params, **state.buffers}[name], x) for name, x in wanted.items())
    assert state.buffers["angles"].tolist() == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_shard_is_read_as_a_slice_of_the_full_tensor(data, directories):
    """Of rows as fsdp has them, and of any dim and groups as tensor_parallel has them."""
    name = data.draw(st.sampled_from(["nomic", "mixtral", "gpt2"]))
    files = WeightFiles(directories / name)
    net = on_meta(name)
    metas = {key: torch.empty(x.shape, device="meta") for key, x in files.tensors.items()}
    made, unexpected = recipes(net, metas)
    assert unexpected == set()
    recipe = data.draw(st.sampled_from(made))
    path = data.draw(st.sampled_from(list(recipe.shapes)))
    full = dict(recipe.read(files.read, {}))[path]
    if data.draw(st.booleans()):
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(full))] * 2)))
        spec, wanted = rows_spec(full.shape, start, stop, owner=True), full[start:stop]
    else:
        dim = data.draw(st.integers(0, full.dim() - 1))
        size = data.draw(st.sampled_from([n for n in (1, 2, 3, 4) if full.shape[dim] % n == 0]))
        groups = data.draw(st.sampled_from([n for n in (1, 2) if full.shape[dim] % (n * size) == 0]))
        index = data.draw(st.integers(0, size - 1))
        spec = shard_spec(LeafSpec(tuple(full.shape), dim, groups), size, index)
        blocks = [block.chunk(size, dim)[index] for block in full.chunk(groups, dim)]
        wanted = torch.cat(blocks, dim)
    shard = dict(recipe.read(files.read, {path: spec}))[path]
    assert torch.equal(shard, wanted)
    assert shard.untyped_storage().nbytes() == shard.nbytes, "it keeps no more than itself alive"


def test_names_of_older_files_are_understood(directories, tmp_path):
    """TensorFlow's gamma and beta."""
    weights = {}
    for file in (directories / "classifier").glob("*.safetensors"):
        weights |= load_file(file)
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in weights.items()
    }
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    net = on_meta("classifier")
    state = plain.init(huggingface.load_pretrained(state_of(net), tmp_path))
    assert differing(state, tensors(type(net).from_pretrained(directories / "classifier"))) == []


def test_either_of_two_tied_weights_may_be_in_the_file(directories, tmp_path):
    weights = {}
    for file in (directories / "gpt2").glob("*.safetensors"):
        weights |= load_file(file)
    embedding = weights.pop("transformer.wte.weight")
    save_file({**weights, "lm_head.weight": embedding}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    state = plain.init(huggingface.load_pretrained(state_of(on_meta("gpt2")), tmp_path))
    assert torch.equal(state.params["transformer.wte.weight"], embedding)
    both = {**weights, "transformer.wte.weight": embedding, "lm_head.weight": embedding + 1}
    save_file(both, tmp_path / "model.safetensors", metadata={"format": "pt"})
    pending = huggingface.load_pretrained(state_of(on_meta("gpt2")), tmp_path)
    with pytest.raises(CheckpointMismatchError, match=r"one tensor of this model.*tie_word_embeddings = False"):
        plain.init(pending)


# ------------------------------------------------------------------------------------------------ new weights


def test_without_strict_what_is_missing_is_drawn_and_what_is_unknown_ignored(tmp_path):
    path = rope_directory(tmp_path / "rope", more=torch.ones(2), **{"other.bias": None})
    with pytest.raises(CheckpointMismatchError, match=r"missing other\.bias.*unexpected more.*new=\(\"other\.\*\",\)"):
        huggingface.load_pretrained(rope(), path)
    state = plain.init(huggingface.load_pretrained(rope(), path, strict=False))
    wanted = load_file(path / "model.safetensors")
    assert torch.equal(state.params["other.weight"], wanted["other.weight"])
    assert state.params["other.bias"].any()
    again = plain.init(huggingface.load_pretrained(rope(), path, strict=False))
    assert torch.equal(state.params["other.bias"], again.params["other.bias"])


def test_patterns_of_new_weights_match_something(tmp_path):
    path = rope_directory(tmp_path / "rope")
    with pytest.raises(PatternError, match="head"):
        huggingface.load_pretrained(rope(), path, new="head.*")


class Silent(Rope):
    reset_parameters = None


def test_a_buffer_that_nothing_computes_is_named(tmp_path):
    state = huggingface.load_pretrained(rope(Silent), rope_directory(tmp_path / "rope"))
    with pytest.raises(ParamsError, match=r"no file has angles.*outside of torch\.device\('meta'\)"):
        plain.init(state)


def test_new_weights_of_a_full_state_stay_as_they_are(directories):
    net = MODELS["classifier"](labels=4)
    with pytest.raises(CheckpointMismatchError, match="of another shape classifier"):
        huggingface.load_pretrained(state_of(net), directories / "classifier")
    state = huggingface.load_pretrained(state_of(net), directories / "classifier", new="classifier.*")
    assert torch.equal(state.params["classifier.weight"], net.classifier.weight)
    base = type(net).from_pretrained(directories / "classifier").bert
    assert torch.equal(state.params["bert.embeddings.word_embeddings.weight"], base.embeddings.word_embeddings.weight)


# ------------------------------------------------------------------------------------------------ bad input


def test_a_dtype_that_torch_does_not_have(tmp_path):
    header = json.dumps({"weight": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises((CheckpointFormatError, CorruptCheckpointError), match="F8_E8M0|damaged"):
        huggingface.load_pretrained(rope(), tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"weight": "../model.safetensors"}}']
)
def test_an_index_that_is_none(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptCheckpointError, match="not an index|outside its directory"):
        huggingface.load_pretrained(rope(), tmp_path)


def test_an_eight_bit_weight_is_not_a_weight(tmp_path):
    path = rope_directory(tmp_path / "rope", weight=torch.randn(6, 4).to(torch.float8_e4m3fn))
    with pytest.raises(CheckpointMismatchError, match="cannot hold weight float8_e4m3fn, not float32"):
        huggingface.load_pretrained(rope(), path)


def test_a_missing_expert_is_a_shape(directories, tmp_path):
    weights = {}
    for file in (directories / "mixtral").glob("*.safetensors"):
        weights |= load_file(file)
    lost = next(name for name in weights if "experts.2.w1" in name)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match="gate_up_proj"):
        huggingface.load_pretrained(state_of(on_meta("mixtral")), tmp_path)


def test_a_state_without_weights_is_not_quantized(directories):
    state = huggingface.load_pretrained(state_of(on_meta("llama")), directories / "llama")
    with pytest.raises(ParamsError, match=r"not been read yet.*\.init\(state\)"):
        lm.quantize(state, "nf4")


def test_weights_are_loaded_once(directories):
    state = huggingface.load_pretrained(state_of(on_meta("llama")), directories / "llama")
    with pytest.raises(CheckpointError, match="Load first"):
        huggingface.load_pretrained(state, directories / "llama")


def test_a_step_does_not_run_before_they_are_read(directories):
    state = huggingface.load_pretrained(state_of(on_meta("llama")), directories / "llama")
    with pytest.raises(StateError, match=r"have not been read.*state = step\.init\(state\)"):
        lm.compose(lm.ema(0.9))(identity)(lm.ema(0.9).init(state), {})
    with pytest.raises(StateError, match=r"have not been read"):
        plain(state, {})


def test_processes_that_have_not_joined_fail_when_they_have(tmp_path, monkeypatch):
    """A process that raised alone would leave the others waiting for it."""
    monkeypatch.setattr("lumen.bridges._pretrained.launched_size", lambda: 2)
    state = huggingface.load_pretrained(rope(), tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=r"contains nothing"):
        plain.init(state)


# ------------------------------------------------------------------------------------------------ around it


def causal(state, batch):
    def loss_fn(params, batch):
        return state.apply(params, **batch)[0].loss

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


@pytest.mark.parametrize("transforms", [[], [lm.ema(0.9), lm.donate()], [lm.fsdp()]], ids=["plain", "ema", "fsdp"])
def test_a_run_reads_them(transforms, directories):
    ids = torch.randint(3, 60, (4, 8), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    full = state_of(hf.LlamaForCausalLM.from_pretrained(directories / "llama").train())
    pending = huggingface.load_pretrained(state_of(on_meta("llama")), directories / "llama")
    runs = [lm.Runner(causal, transforms=transforms, progress=False) for _ in range(2)]
    wanted, state = (
        run.fit(each, [batch] * 2, until=lm.Steps(2)).export() for run, each in zip(runs, (full, pending), strict=True)
    )
    assert differing(state, {**wanted.params, **wanted.buffers}) == []


def test_a_plan_reads_no_values(directories, tmp_path):
    shutil.copytree(directories / "llama", tmp_path / "llama")
    state = huggingface.load_pretrained(state_of(on_meta("llama")), tmp_path / "llama")
    shutil.rmtree(tmp_path / "llama")
    ids = torch.ones(2, 8, dtype=torch.int64)
    plan = lm.plan(lm.fsdp()(causal), state, {"input_ids": ids, "labels": ids}, world_size=2, device="cpu")
    params = sum(p.nbytes for p in state.params.values())
    assert 0.4 * params < plan.peak.by_category["params"] < 0.6 * params
