"""Every Python block of the README runs, in order, in one session."""

import re
from pathlib import Path

import pytest
import torch

import lumen as lm

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.timeout(240)
def test_readme_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    session: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), session)
    assert session["result"].metrics["val/accuracy"] > 0.8
    assert session["metrics"]["loss"].compute().shape == torch.Size([8])
    assert (tmp_path / "runs/readme/metrics.jsonl").exists()


def test_the_transform_of_the_docs_scales_grads() -> None:
    page = README.parent / "docs" / "transforms.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    session: dict = {"lm": lm}
    exec(compile(block, page.name, "exec"), session)

    def step(state, batch):
        loss, grads = lm.value_and_grad(lambda params, x: state.apply(params, x)[0].mean())(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    state = lm.TrainState.create(torch.nn.Linear(3, 1), lm.optim.sgd(1.0))
    batch = torch.randn(4, 3)
    plain, _ = step(state, batch)
    scaled, _ = lm.compose(session["scale_grads"](3.0), lm.donate())(step)(lm.donate().init(state), batch)
    for name, before in state.params.items():
        torch.testing.assert_close(scaled.params[name] - before, 3.0 * (plain.params[name] - before))
