"""Models whose layers can be cut, with their plans, for laws of `tensor_parallel`.

Biases of keys, which have no gradient in exact arithmetic, are left out. B batch, T time, C width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lumen.parallel import Colwise, Rowwise
from lumen.parallel.tensor import plans
from tests.distributed import models
from tests.distributed.models import CLASSES, WIDTH

VOCABULARY, TIME = 12, 6


def tokens_of(x):
    """Tokens [B, T] from the columns of a batch that all models share."""
    return (x.abs() * 5).long().clamp(max=VOCABULARY - 1)


class Block(nn.Module):
    """As in the character model of the examples: it takes the number of heads from what it is given."""

    def __init__(self, width, heads):
        super().__init__()
        self.size = width // heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, -1, self.size)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / self.size**0.5
        mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
        attended = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ v
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class TinyGPT(nn.Module):
    """Two blocks, a learned position, embedding and head tied, and a small head for the classes of the tests."""

    def __init__(self, width=8, heads=4):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(TIME, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.mix = nn.Linear(VOCABULARY, CLASSES)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        ids = tokens_of(x)
        h = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.mix(self.head(self.norm(h))).mean(1)


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


class LlamaAttention(nn.Module):
    """Rotary attention with fewer heads for keys and values, which reads the shape of its input."""

    def __init__(self, width, heads, kv_heads):
        super().__init__()
        self.head_dim = width // heads
        self.num_key_value_groups = heads // kv_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states, position_embeddings):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = position_embeddings
        q, k = (
            x * cos + torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1) * sin for x in (q, k)
        )
        k, v = (x.repeat_interleave(self.num_key_value_groups, 1) for x in (k, v))
        out = torch.softmax(q @ k.transpose(-1, -2) / self.head_dim**0.5, -1) @ v
        return self.o_proj(out.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


class LlamaMLP(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.self_attn = LlamaAttention(width, heads=8, kv_heads=4)
        self.mlp = LlamaMLP(width, 12)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width), RMSNorm(width)

    def forward(self, hidden_states, position_embeddings):
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), position_embeddings=position_embeddings
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Llama(nn.Module):
    """The module names of Hugging Face's `LlamaForCausalLM`."""

    def __init__(self, width=16):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCABULARY, width, padding_idx=3)
        self.model.layers = nn.ModuleList([LlamaLayer(width) for _ in range(2)])
        self.model.norm = RMSNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.mix = nn.Linear(VOCABULARY, CLASSES)

    def forward(self, x):
        h = self.model.embed_tokens(tokens_of(x))
        head_dim = self.model.layers[0].self_attn.head_dim
        angles = torch.arange(h.shape[1]).unsqueeze(-1) / 10.0 ** (torch.arange(head_dim // 2) / head_dim)
        angles = torch.cat((angles, angles), -1).to(h.dtype)
        for layer in self.model.layers:
            h = layer(h, position_embeddings=(angles.cos(), angles.sin()))
        return self.mix(self.lm_head(self.model.norm(h))).mean(1)


class Conv1D(nn.Module):
    """A linear layer with its weight the other way round, as Hugging Face's GPT-2 has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.2), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        size = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(size)


class GPT2Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.split_size, self.head_dim = width, width // heads
        self.c_attn, self.c_proj = Conv1D(3 * width, width), Conv1D(width, width)

    def forward(self, hidden_states):
        parts = self.c_attn(hidden_states).split(self.split_size, dim=2)
        q, k, v = (x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2) for x in parts)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.c_proj(out.reshape(*out.shape[:-2], -1).contiguous()), None


class GPT2MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(2 * width, width), Conv1D(width, 2 * width)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class GPT2Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = GPT2Attention(width, 4), GPT2MLP(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))[0]
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """The module names of Hugging Face's `GPT2LMHeadModel`, its head tied to its embedding."""

    def __init__(self, width=8):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.wte, self.transformer.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(TIME, width)
        self.transformer.h = nn.ModuleList([GPT2Block(width) for _ in range(2)])
        self.transformer.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.mix = nn.Linear(VOCABULARY, CLASSES)

    def forward(self, x):
        ids = tokens_of(x)
        h = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.shape[1]))
        for block in self.transformer.h:
            h = block(h)
        return self.mix(self.lm_head(self.transformer.ln_f(h))).mean(1)


class Reading(nn.Module):
    """A model that reads cut weights without calling their layers: an output layer that is the embedding's weight."""

    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.mix = nn.Linear(VOCABULARY, CLASSES)

    def forward(self, x):
        h = self.embed(tokens_of(x))
        h = h + self.down(torch.tanh(self.up(h)))
        return self.mix(F.linear(h, self.embed.weight)).mean(1) + self.up.bias.sum() * self.up.weight.pow(2).mean()


class Wide(nn.Module):
    """An embedding cut by its width, a layer that gathers its output, one that cuts its input, and a frozen one."""

    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.twice = nn.Linear(width, 2 * width)
        self.once = nn.Linear(2 * width, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x):
        h = self.frozen(torch.tanh(self.once(torch.tanh(self.twice(self.embed(tokens_of(x)))))))
        return self.out(h).mean(1)


models.register(tiny=TinyGPT, llama=Llama, gpt2=GPT2, reading=Reading, wide=Wide)

PLANS = {
    ("mlp", False): {"0": Colwise(), "2": Rowwise()},
    ("tiny", False): plans.gpt(vocabulary=True),
    ("tiny", True): plans.gpt(sequence=True),
    ("llama", False): plans.hf_llama(),
    ("llama", True): plans.hf_llama(sequence=True),
    ("gpt2", False): plans.hf_gpt2(vocabulary=True),
    ("gpt2", True): plans.hf_gpt2(sequence=True),
    ("reading", False): {"embed": Rowwise(), "up": Colwise(), "down": Rowwise()},
    ("wide", False): {
        "embed": Colwise(output="replicate"),
        "twice": Colwise(groups=2, output="replicate"),
        "once": Rowwise(input="replicate"),
        "frozen": Colwise(output="replicate"),
    },
    ("wide", True): {
        "twice": Colwise(),
        "once": Rowwise(output="sequence"),
        "frozen": Colwise(input="sequence", output="replicate"),
    },
}
assert WIDTH == TIME
