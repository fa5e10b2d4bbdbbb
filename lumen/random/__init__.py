"""Random numbers as pure functions of explicit keys: nothing here reads or advances a global generator.

A key is an int64 tensor of shape [2] with two 32-bit words, high then low. A sampler hashes the numbers 0, 1, 2, …
under the key. So equal keys give equal numbers in eager mode, in each lane of `torch.func.vmap` and under
`torch.compile`. The result is on the key's device. Use a key once: pass it to one sampler, or `split` it, or `fold_in`
data, but never do two of these, because all hash the same numbers: `split(key, n)[i]` is `fold_in(key, i)`, and word
`i` of `bits(key, [n])` is the exclusive or of that key's two words.

    >>> import lumen as lm
    >>> dropout_key, noise_key = lm.random.split(lm.random.key(0))
    >>> lm.random.normal(noise_key, (2,))
    tensor([-2.4425, -2.0357])

The hash is threefry2x32 with 20 rounds (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3",
SC11, 2011), and equals the authors' Random123 bit for bit. Keys and counters are laid out as in `jax.random` under
`jax_threefry_partitionable=True`, JAX's default. Every function states which results equal JAX's. Words are int64
because PyTorch has no arithmetic on uint32.
"""

from lumen.random._keys import by_row, fold_in, key, split
from lumen.random._samplers import bernoulli, bits, normal, permutation, randint, uniform

__all__ = [
    "bernoulli",
    "bits",
    "by_row",
    "fold_in",
    "key",
    "normal",
    "permutation",
    "randint",
    "split",
    "uniform",
]


def __dir__() -> list[str]:
    return sorted(__all__)
