"""What Lumen writes, read by Orbax and JAX, safetensors and torch alone."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import namedtuple

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from torch import nn

import lumen as lm
from lumen import checkpoint
from lumen.checkpoint import Store, packing
from lumen.errors import CheckpointError, CheckpointExistsError, CheckpointNotFoundError

Moments = namedtuple("Moments", "mu nu")

# No torch, no lumen: what a JAX user has.
READ = """
import json, sys
import jax, numpy as np, orbax.checkpoint as ocp

directory = sys.argv[1]

def listing(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in flat}
    return {name: [str(x.dtype), list(x.shape), x.tobytes().hex()] for name, x in leaves.items()}

found = {}
with ocp.CheckpointManager(directory) as manager:
    found["steps"] = list(manager.all_steps())
    step = manager.latest_step()
    trees = {"state": ocp.args.PyTreeRestore(), "extra": ocp.args.PyTreeRestore()}
    everything = manager.restore(step, args=ocp.args.Composite(**trees, meta=ocp.args.JsonRestore()))
    found["manager"] = listing(everything["state"])
    found["extra"] = listing(everything["extra"])
    found["meta"] = everything["meta"]["meta"]
with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
    args = ocp.args.Composite(state=ocp.args.StandardRestore())
    found["standard"] = listing(manager.restore(step, args=args)["state"])
found["pytree"] = listing(ocp.PyTreeCheckpointer().restore(f"{directory}/{step}/state"))
found["checkpointer"] = listing(ocp.StandardCheckpointer().restore(f"{directory}/{step}/state"))
assert not {"torch", "lumen"} & set(sys.modules)
print(json.dumps(found))
"""


def in_orbax(directory):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    result = subprocess.run(
        [sys.executable, "-c", READ, str(directory)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def entry(tensor):
    dtype = checkpoint.dtypes.NAMES[tensor.dtype]
    data = checkpoint.dtypes.bits(tensor.contiguous()).numpy().tobytes()
    return [dtype, list(tensor.shape), data.hex()]


def test_orbax_reads_every_array(tmp_path):
    odd = {"a/b": torch.ones(2), "": torch.ones(3), "..": torch.ones(1), "é": torch.zeros(1), "A": torch.ones(1)}
    dtypes = ["float8_e4m3fn", "float8_e5m2", "int8", "uint16", "int64", "uint64", "bool", "float16", "float64"]
    tree = {
        "params": {"layer.weight": torch.randn(3, 5), "layer.bias": torch.tensor([1.0, -0.0, float("nan")]).bfloat16()},
        "moments": Moments(torch.randn(2, 3).t(), (torch.randn(2, dtype=torch.complex64), torch.tensor(7))),
        "kinds": {name: torch.tensor([0, 1, 1]).to(getattr(torch, name)) for name in dtypes},
        "odd": odd,
        "epoch": 3,
    }
    with Store(tmp_path, keep=2) as store:
        for step in (5, 10, 15):
            store.save(step, tree, extra={"rng": torch.arange(4, dtype=torch.uint8)}, meta={"lr": 0.1})
        store.wait()
        store.quarantine(store.path(10))
        found = in_orbax(tmp_path)  # beside a run that writes
        store.save(20, tree)
    expected = {
        "params/layer.weight": tree["params"]["layer.weight"],
        "params/layer.bias": tree["params"]["layer.bias"],
        "moments/mu": tree["moments"].mu,
        "moments/nu/0": tree["moments"].nu[0],
        "moments/nu/1": tree["moments"].nu[1],
        **{f"kinds/{name}": tensor for name, tensor in tree["kinds"].items()},
        **{f"odd/{name}": odd[key] for name, key in zip(["a%2Fb", "%", "%2E.", "%C3%A9", "A"], odd, strict=True)},
    }
    arrays = {name: entry(tensor) for name, tensor in expected.items()}
    assert found["steps"] == [15]
    for way in ("manager", "standard", "pytree", "checkpointer"):
        assert found[way] == arrays, way
    assert found["extra"] == {"rng": ["uint8", [4], "00010203"]}
    assert found["meta"] == {"lr": 0.1}
    assert store.steps() == [15, 20]


def test_orbax_reads_a_train_state(tmp_path):
    state = lm.TrainState.create(nn.Linear(3, 2), lm.optim.adamw(1e-3), seed=1)
    with Store(tmp_path) as store:
        store.save(0, state, extra={"rng": checkpoint.rng.capture()})
    found = in_orbax(tmp_path)["manager"]
    assert found["params/weight"] == entry(state.params["weight"])
    assert found["step"] == entry(state.step)


def test_orbax_reads_packed_arrays_and_the_header_says_whose_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MANY", 2)
    monkeypatch.setattr(packing, "SMALL", 100)
    small = {"bias": torch.randn(5), "a/b": torch.ones(2, 3), "scale": torch.tensor(7.0)}
    checkpoint.save(tmp_path / "x", {"params": small, "large": torch.randn(200), "count": torch.tensor(3)})
    arrays = ocp.PyTreeCheckpointer().restore((tmp_path / "x" / "state").absolute())
    assert {"/".join(path): x.shape for path, x in flattened(arrays)} == {
        "large": (200,),
        "~packed/float32": (12,),
        "~packed/int64": (1,),
    }
    header = json.loads((tmp_path / "x" / "meta" / "metadata").read_text())
    (pack,) = (pack for pack in header["packs"] if pack["dtype"] == "float32")
    assert (pack["item"], pack["array"]) == ("state", "~packed.float32")
    found, start = {}, 0
    for path, shape in pack["leaves"]:
        end = start + math.prod(shape)
        found["/".join(path)] = np.asarray(arrays["~packed"]["float32"][start:end]).reshape(shape)
        start = end
    assert found.keys() == {f"params/{name}" for name in small}
    for name, tensor in small.items():
        assert np.array_equal(found[f"params/{name}"], tensor.numpy())


def flattened(tree, path=()):
    """Pairs of path and array of nested dicts."""
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [pair for key, each in tree.items() for pair in flattened(each, (*path, key))]


# ----------------------------------------------------------------------------------------------------- exports


@pytest.fixture
def saved(tmp_path):
    averaged = lm.ema(0.9)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    state = averaged.init(lm.TrainState.create(net, lm.optim.adamw(1e-3)))
    half = {name: param.bfloat16() for name, param in state.params.items()}
    state = state.replace(params=half)
    checkpoint.save(tmp_path / "x", {"state": state, "epoch": 3})
    return tmp_path / "x", state


def read(path, kind):
    if kind == "torch":
        return torch.load(path, weights_only=True)
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("what", ["params", "buffers", "ema", "state"])
def test_exports_are_read_back(saved, tmp_path, kind, what):
    path, state = saved
    exported = checkpoint.export(path, tmp_path / "new" / "file", format=kind, what=what)
    assert exported == tmp_path / "new" / "file"
    assert os.listdir(exported.parent) == ["file"]
    found = read(exported, kind)
    if what == "state":
        assert {f"state/params/{name}" for name in state.params} < set(found)
        found = {name.removeprefix("state/params/"): x for name, x in found.items() if name.startswith("state/params/")}
    expected = {"buffers": state.buffers, "ema": lm.ema.params(state)}.get(what, state.params)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_an_export_loads_into_the_module(saved, tmp_path):
    path, state = saved
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).bfloat16()
    both = {}
    for what in ("params", "buffers"):
        both |= read(checkpoint.export(path, tmp_path / what, what=what), "safetensors")
    net.load_state_dict(both)
    assert torch.equal(net[0].weight, state.params["0.weight"])


def test_exports_that_cannot_be(saved, tmp_path, monkeypatch):
    path, _ = saved
    for kwargs in ({"format": "pickle"}, {"what": "optimizer"}):
        with pytest.raises(CheckpointError, match="export takes format="):
            checkpoint.export(path, tmp_path / "a", **kwargs)
    (tmp_path / "there").write_text("mine")
    with pytest.raises(CheckpointExistsError):
        checkpoint.export(path, tmp_path / "there")
    checkpoint.save(tmp_path / "y", {"weights": torch.ones(1)})
    with pytest.raises(CheckpointNotFoundError, match=r"no ema to export: nothing under 'slots/ema/params'.*weights"):
        checkpoint.export(tmp_path / "y", tmp_path / "a", what="ema")
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoint.export(path, tmp_path / "there" / "a")
    with monkeypatch.context() as patch:
        patch.setattr("lumen.checkpoint._export.sync_file", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(CheckpointError, match="full"):
            checkpoint.export(path, tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["there", "x", "y"]
    assert (tmp_path / "there").read_text() == "mine"


def test_numpy_arrays_export_too(tmp_path):
    checkpoint.save(tmp_path / "x", {"params": {"w": np.arange(3), "e": np.zeros((0, 2))}})
    for kind in ("safetensors", "torch"):
        found = read(checkpoint.export(tmp_path / "x", tmp_path / kind, format=kind), kind)
        assert found["w"].tolist() == [0, 1, 2]
        assert found["e"].shape == (0, 2)
