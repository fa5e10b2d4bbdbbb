"""Published weights of many families, read on the meta device and written again, beside `from_pretrained`."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import lumen as lm
from lumen.bridges import huggingface
from tests.distributed.pretrained_models import differing, state_of, tensors
from tests.parity.hf_families import FAMILIES, make_net

pytestmark = pytest.mark.timeout(300)


def weights(path):
    files = [load_file(file) for file in path.glob("*.safetensors")]
    return {name: x for file in files for name, x in file.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_read_and_written_as_transformers_does(family, tmp_path):
    make_net(family).save_pretrained(tmp_path / "published")
    kind = type(make_net(family))
    wanted = kind.from_pretrained(tmp_path / "published")
    with torch.device("meta"):
        net = kind._from_config(wanted.config, dtype=torch.float32)
    step = lm.compose()(lambda state, batch: (state, {}))
    state = step.init(huggingface.load_pretrained(state_of(net), tmp_path / "published"))
    assert differing(state, tensors(wanted)) == []
    huggingface.save_pretrained(state, tmp_path / "saved", step=step, max_shard_size=5000)
    found, published = weights(tmp_path / "saved"), weights(tmp_path / "published")
    assert found.keys() == published.keys()
    assert all(torch.equal(x, published[name]) for name, x in found.items())
