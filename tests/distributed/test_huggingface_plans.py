"""Tensor parallelism by the plans that transformers publishes: families on two processes compute as on one."""

from __future__ import annotations

import warnings

import pytest
import torch

import lumen as lm
from lumen.errors import ParamsError, PatternError
from lumen.parallel import Colwise, ReplicatedParams, Rowwise, plans
from lumen.parallel.comm.mesh import mesh
from tests.tiers import pick

hf = pytest.importorskip("transformers")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = [
    *(
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "cwm",
        "ernie4_5",
        "exaone",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
    ),
    *("glm", "glm4", "gpt_neox", "granite", "helium", "jais2", "llama", "ministral", "mistral", "nanochat", "nemotron"),
    *("olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2", "vaultgemma"),
]
EACH = 4  # families in one task
HERE = pick(
    [name for name in FAMILIES if name not in {"cohere", "cwm", "exaone", "glm", "ministral", "olmo", "olmo2"}],
    FAMILIES,
)


def make(family):
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(family, **SIZES)
    for name in ("residual_dropout", "attention_dropout"):
        setattr(config, name, 0.0)
    config._attn_implementation = "eager"
    return hf.AutoModelForCausalLM.from_config(config).double().train()


def step(state, tokens):
    def loss_fn(params, tokens):
        out, _ = state.apply(params, input_ids=tokens, labels=tokens, use_cache=False)
        return out.loss

    loss, grads = lm.value_and_grad(loss_fn)(state.params, tokens)
    return state.apply_gradients(grads), {"loss": loss}


def trained(net, *transforms):
    wrapped = lm.compose(*transforms)(step)
    state = wrapped.init(lm.TrainState.create(net, lm.optim.sgd(0.1, momentum=0.9)))
    for tokens in torch.randint(3, 32, (2, 2, 7), generator=torch.Generator().manual_seed(1)):
        state, _ = wrapped(state, tokens)
    return {name: p.clone() for name, p in wrapped.export(state).params.items()}


def furthest(families):
    warnings.simplefilter("ignore")
    found = {}
    for family in families:
        plan = plans.huggingface(make(family))
        sharded = trained(make(family), lm.tensor_parallel(plan, mesh(tensor=-1, device="cpu")), lm.chunked_logits())
        wanted = trained(make(family))
        found[family] = max(float((sharded[name] - p).abs().max()) for name, p in wanted.items())
    return found


@pytest.mark.parametrize("families", [HERE[at : at + EACH] for at in range(0, len(HERE), EACH)], ids="-".join)
def test_two_processes_compute_as_one(families, world2):
    # Many norms of transformers compute in float32, whatever the dtype of the params.
    for found in world2.run(furthest, families, limit=240):
        assert {family: far for family, far in found.items() if not far < 1e-6} == {}


def test_what_a_plan_says():
    plan = plans.huggingface(make("qwen3"))
    assert plan["model.layers.1.self_attn.q_norm"] == ReplicatedParams()
    assert plan["lm_head"] == Colwise(output="replicate")
    whole = plans.huggingface(make("smollm3"), vocabulary=False)
    assert not {"lm_head", "model.embed_tokens"} & whole.keys()
    assert plans.huggingface(make("smollm3"))["model.embed_tokens"] == Rowwise()  # tied to the head


@pytest.mark.parametrize(
    ("family", "sizes", "said"),
    [
        ("mixtral", {"num_local_experts": 2}, r"experts\.gate_up_proj \(packed_colwise\)"),
        ("deepseek_v2", {"kv_lora_rank": 8, "q_lora_rank": 8, "n_routed_experts": 2}, r"mla_kv_a_proj"),
    ],
)
def test_what_cannot_be_sharded_is_named(family, sizes, said):
    with torch.device("meta"):
        net = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(family, **SIZES, **sizes))
    with pytest.raises(PatternError, match=said):
        plans.huggingface(net)


def test_a_model_without_a_plan_is_named():
    with torch.device("meta"):
        net = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model("gpt2", n_embd=8, n_head=2, n_layer=1))
    with pytest.raises(ParamsError, match="publishes no tensor-parallel plan for GPT2LMHeadModel"):
        plans.huggingface(net)
