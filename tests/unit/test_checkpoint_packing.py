"""Many small arrays as few large ones: the same leaves, by fewer files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lumen import checkpoint
from lumen.checkpoint import _load, dtypes, header, packing
from lumen.checkpoint._load import Reader, ReadRequest
from lumen.core.sharding import Slice
from lumen.errors import CorruptCheckpointError

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "uint16", "bool", "complex64")


def leaves():
    generator = torch.Generator().manual_seed(0)
    bits = {name: torch.randint(2, (3, 2), generator=generator).to(dtypes.TORCH[name]) for name in DTYPES}
    return {
        "large": torch.randn(100, generator=generator),
        "small": [torch.randn(5, generator=generator), torch.tensor(7.0), torch.randn(2, 3, generator=generator)],
        "dtypes": bits,
        "numpy": np.arange(3, dtype=np.float32),
        "generic": np.float32(1.5),
        "empty": torch.zeros(0, 3),
        "a/b": torch.ones(1),
        "scalar": 3,
    }


def assert_same(found, wanted):
    one, other = checkpoint.leaves.named(found), checkpoint.leaves.named(wanted)
    assert one[0] == other[0]
    for have, want in zip(one[1], other[1], strict=True):
        assert type(have) is type(want)
        if isinstance(want, torch.Tensor):
            assert (have.dtype, have.shape) == (want.dtype, want.shape)
            assert torch.equal(dtypes.bits(have), dtypes.bits(want))
        else:
            assert np.array_equal(have, want)


def like(tree):
    _, values, spec = checkpoint.leaves.named(tree)
    return spec.unflatten([torch.zeros_like(x) if isinstance(x, torch.Tensor) else x * 0 for x in values])


@pytest.fixture
def packed(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MANY", 5)
    monkeypatch.setattr(packing, "SMALL", 100)
    path = tmp_path / "packed"
    checkpoint.save(path, leaves(), extra={"rng": torch.arange(3)})
    return path


def forge(path, change):
    """Change the table of packed arrays, under a digest that fits."""
    content = json.loads((path / header.FILE).read_text())
    content.pop("digest")
    change(content["packs"])
    (path / header.FILE).write_text(json.dumps({**content, "digest": header._digest(content)}))


def test_packed_leaves_are_what_they_were(packed, tmp_path):
    arrays = {path.parent.name for path in (packed / "state").rglob("zarr.json")}
    assert arrays == {"large", *(f"~packed.{name}" for name in DTYPES)}
    assert checkpoint.metadata(packed)["format"] == 3
    assert "packs" not in checkpoint.metadata(packed)
    assert checkpoint.metadata(packed)["leaves"]["small/2"] == {"kind": "tensor", "dtype": "float32", "shape": (2, 3)}
    assert_same(checkpoint.restore(packed, like(leaves())), leaves())
    assert torch.equal(checkpoint.load(packed, under="small/2"), leaves()["small"][2])
    assert torch.equal(checkpoint.load(packed, item="extra")["rng"], torch.arange(3))
    small = checkpoint.load(packed, under="small")
    assert len({small[i].untyped_storage().data_ptr() for i in small}) == 3  # nobody's memory is another's
    assert small[0].untyped_storage().nbytes() == 20
    wide = checkpoint.restore(packed, {**like(leaves()), "a/b": torch.zeros(1).double()}, cast=True)
    assert torch.equal(wide["a/b"], torch.ones(1).double())
    few = tmp_path / "few"
    checkpoint.save(few, {"a": torch.ones(2), "b": torch.ones(3)})
    assert checkpoint.metadata(few)["format"] == 1


def test_many_leaves_are_few_files_and_hardly_more_bytes(tmp_path):
    size, many = 100, 15_000
    flat = torch.arange(many * size, dtype=torch.float32).view(many, size)
    tree = {"small": {f"layers.{i}.bias": row for i, row in enumerate(flat)}, "large": [flat, flat.bfloat16()]}
    path = tmp_path / "many"
    checkpoint.save(path, tree)
    inodes = [path, *path.rglob("*")]
    assert len(inodes) <= 500
    state = many * size * 4 + flat.nbytes + flat.nbytes // 2
    assert sum(each.stat().st_size for each in inodes if each.is_file()) <= 1.2 * state
    assert torch.equal(checkpoint.load(path, under=f"small/layers.{many - 1}.bias"), flat[-1])


def test_parts_of_a_packed_leaf(packed):
    reader = Reader(packed)
    record = next(record for record in reader.records if record.path == ("small", 2))
    boxes = (Slice(local=(0, 0), full=(1, 1), size=(1, 2)), Slice(local=(1, 0), full=(0, 0), size=(1, 2)))
    (found,) = reader.read([record], None, {record.path: ReadRequest((2, 2), boxes)})
    whole = leaves()["small"][2]
    assert torch.equal(found, torch.stack([whole[1, 1:], whole[0, :2]]))


def test_damaged_and_forged_packs(packed, monkeypatch):
    data = packed / "state" / "~packed.float32" / "c" / "0"
    content = bytearray(data.read_bytes())
    content[3] ^= 1
    good = data.read_bytes()
    data.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="~packed.float32.*checksum"):
        checkpoint.load(packed, under="small")
    data.write_bytes(good)
    text = (packed / header.FILE).read_text()

    def entry(packs):
        return next(pack for pack in packs if pack["dtype"] == "float32")

    forgeries = [
        lambda packs: entry(packs)["leaves"].pop(),
        lambda packs: entry(packs)["leaves"].append([["more"], [10**9]]),
        lambda packs: entry(packs)["leaves"][0].append("int"),
        lambda packs: entry(packs)["leaves"][0].__setitem__(1, [2**40, 2**40]),
        lambda packs: entry(packs)["leaves"][0].__setitem__(1, [0]),
        lambda packs: entry(packs)["leaves"][0].__setitem__(0, [["a"]]),
        lambda packs: entry(packs).update(dtype="float64"),
        lambda packs: entry(packs).update(array="../../secret"),
        lambda packs: entry(packs).update(array=None),
        lambda packs: entry(packs).update(leaves=[]),
        lambda packs: entry(packs).update(leaves=3),
        lambda packs: packs.append(3),
        lambda packs: packs[0].pop("item"),
    ]
    monkeypatch.setattr(_load.torch, "empty", lambda *a, **k: pytest.fail(f"{a} was taken"))
    for change in forgeries:
        forge(packed, change)
        with pytest.raises(CorruptCheckpointError):
            checkpoint.load(packed, under="small")
        (packed / header.FILE).write_text(text)


def test_a_single_entry_of_a_larger_tensor_is_saved(tmp_path):
    """It is contiguous whatever its stride, and a view of it as bytes needs stride 1."""
    tree = {"a": torch.arange(4.0)[2::2][:1], "b": torch.ones(3, 5)[:, 1][:1], "c": torch.ones(()).expand(1)}
    assert [leaf.stride() for leaf in tree.values()] == [(2,), (5,), (0,)]
    checkpoint.save(tmp_path / "x", tree)
    restored = checkpoint.restore(tmp_path / "x", {name: torch.zeros(1) for name in tree})
    assert {name: leaf.tolist() for name, leaf in restored.items()} == {"a": [2.0], "b": [1.0], "c": [1.0]}
