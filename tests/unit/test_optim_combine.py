"""Transforms made of transforms, and parameters by name."""

import re

import pytest
import torch

import lumen as lm
from lumen import optim
from lumen.core import _torch_compat
from lumen.errors import ArgumentError, PatternError, StateError
from lumen.optim._param_names import selected

SHAPES = {"encoder.fc.weight": (4, 3), "encoder.fc.bias": (4,), "norm.weight": (4,), "head.weight": (2, 4)}


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def steps(tx, count=3):
    params = tensors(0)
    opt_state = tx.init(params)
    for step in range(count):
        params, opt_state = tx.apply(tensors(step + 1), opt_state, params)
    return params


def plain(tx):
    return optim.GradientTransformation(tx.init_fn, tx.update_fn)


BOTH = pytest.mark.parametrize("lower", [lambda tx: tx, plain], ids=["fused", "plain"])


class TestDecayMask:
    SELECTORS = (
        optim.matrices,
        ["*.fc.weight", "head.*"],
        re.compile(r"(fc|head)\.weight$"),
        lambda name, leaf: name.endswith("weight") and "norm" not in name,
    )

    @BOTH
    @pytest.mark.parametrize("selector", SELECTORS)
    @pytest.mark.parametrize(
        "make",
        [optim.adamw, optim.adam, optim.sgd, optim.lion],
    )
    def test_selected_leaves_decay_and_the_others_do_not(self, make, selector, lower):
        masked = steps(lower(make(0.01, weight_decay=0.5, decay_mask=selector)))
        decayed, free = (steps(lower(make(0.01, weight_decay=decay))) for decay in (0.5, 0.0))
        for name in SHAPES:
            whole = decayed if name in ("encoder.fc.weight", "head.weight") else free
            assert torch.equal(masked[name], whole[name]), name
            assert not torch.equal(decayed[name], free[name])

    def test_mask_costs_one_more_kernel_call(self, monkeypatch):
        calls = []
        kernel = torch._fused_adamw_
        monkeypatch.setattr(
            _torch_compat, "fused_adamw_", lambda *args, **kwargs: (calls.append(len(args[0])), kernel(*args, **kwargs))
        )
        steps(optim.adamw(0.01, decay_mask=optim.matrices), 1)
        assert calls == [2, 2]

    def test_lamb_and_add_decayed_weights_take_the_same_selectors(self):
        params = tensors(0)
        zero = lm.tree.map(torch.zeros_like, params)
        for selector in self.SELECTORS:
            tx = optim.add_decayed_weights(0.5, selector)
            updates, _ = tx.update(zero, tx.init(params), params)
            assert [name for name, u in updates.items() if u.any()] == ["encoder.fc.weight", "head.weight"]
            optim.lamb(0.1, weight_decay=0.1, decay_mask=selector).init(params)

    def test_unknown_pattern_is_an_error_at_init(self):
        for tx in (
            optim.adamw(0.1, decay_mask="*.kernel"),
            optim.adamw(0.1, decay_mask=["*.weight", "*.kernel"]),
            optim.sgd(0.1, weight_decay=0.1, decay_mask=re.compile("kernel")),
            optim.lion(0.1, weight_decay=0.1, decay_mask="*.kernel"),
            optim.add_decayed_weights(0.1, "*.kernel"),
            optim.freeze("*.kernel"),
        ):
            with pytest.raises(PatternError, match="kernel.*matches none of the 4 parameter names"):
                tx.init(tensors(0))

    def test_error_lists_near_names(self):
        with pytest.raises(PatternError, match=re.escape("encoder.fc.weight")):
            optim.freeze("encoder.fc.weigth").init(tensors(0))


def test_globs_match_whole_names_and_regular_expressions_any_part():
    params = {"Fc.weight": torch.ones(1), "fc.weight": torch.ones(1), "fc.inner.weight_norm": torch.ones(1)}
    for selector, expected in {
        "fc.*": [False, True, True],
        "*.weight": [True, True, False],
        "?c.weight": [True, True, False],
        "[F]c.*": [True, False, False],
        "fc.*.weight*": [False, False, True],
        re.compile("weight"): [True, True, True],
        re.compile("weight$"): [True, True, False],
    }.items():
        assert selected(selector, params) == expected, selector
    for nothing in ("weight", "FC.*", re.compile("^weight")):
        with pytest.raises(PatternError):
            selected(nothing, params)


class TestPartition:
    @BOTH
    def test_each_part_is_its_own_run(self, lower):
        parts = {"*.bias": optim.sgd(0.1, 0.9), re.compile("^norm"): optim.lion(0.01)}
        found = steps(lower(optim.partition(parts, default=optim.adamw(0.01))))
        runs = [steps(lower(tx)) for tx in (*parts.values(), optim.adamw(0.01))]
        owners = {"encoder.fc.bias": 0, "norm.weight": 1, "encoder.fc.weight": 2, "head.weight": 2}
        for name, owner in owners.items():
            assert torch.equal(found[name], runs[owner][name]), name
        assert list(found) == list(SHAPES)

    @BOTH
    def test_labels(self, lower):
        tx = optim.partition(
            {"matrix": optim.adamw(0.01), "vector": optim.sgd(0.1)},
            label=lambda name, leaf: "matrix" if leaf.dim() == 2 else "vector",
        )
        found, matrices, vectors = steps(lower(tx)), steps(lower(optim.adamw(0.01))), steps(lower(optim.sgd(0.1)))
        for name, shape in SHAPES.items():
            assert torch.equal(found[name], (matrices if len(shape) == 2 else vectors)[name])

    def test_layer_wise_learning_rates(self):
        rates = {"encoder.*": 0.01, "norm.*": 0.1, "head.*": 1.0}
        found = steps(optim.partition({pattern: optim.sgd(rate) for pattern, rate in rates.items()}))
        for pattern, rate in rates.items():
            for name in SHAPES:
                if name.startswith(pattern[:-1]):
                    assert torch.equal(found[name], steps(optim.sgd(rate))[name])

    def test_memory_is_kept_for_own_leaves_only(self):
        tx = optim.partition({"head.*": optim.adamw(0.1)}, default=optim.freeze())
        opt_state = tx.init(tensors(0))
        assert list(opt_state.groups[0].mu) == ["head.weight"]
        assert opt_state.groups[1] == ()

    def test_nested_names_and_nested_partitions(self):
        params = {"encoder": {"fc": [torch.ones(2), torch.ones(2)]}, "head": (torch.ones(2),)}
        inner = optim.partition({"*.1": optim.sgd(1.0)}, default=optim.sgd(0.5))
        tx = optim.partition({"encoder.fc.*": inner}, default=optim.freeze())
        grads = lm.tree.map(torch.ones_like, params)
        for lowering in (tx, plain(tx)):
            new, _ = lowering.apply(grads, lowering.init(params), params)
            assert [leaf[0].item() for leaf in lm.tree.leaves(new)] == [0.5, 0.0, 1.0]

    @pytest.mark.parametrize(
        ("tx", "message"),
        [
            (optim.partition({"*.kernel": optim.sgd(0.1)}, optim.sgd(0.1)), "'\\*.kernel' matches none"),
            (optim.partition({"*.bias": optim.sgd(0.1)}), "no pattern of the partition matches encoder.fc.weight"),
            (optim.partition({"*": optim.sgd(0.1), "*.bias": optim.sgd(1.0)}), "belongs to an earlier pattern"),
            (optim.partition({"a": optim.sgd(0.1)}, label=lambda name, leaf: "b"), "label 'b' of 'encoder"),
        ],
    )
    def test_leaves_and_patterns_without_each_other_are_refused(self, tx, message):
        with pytest.raises(PatternError, match=message):
            tx.init(tensors(0))

    def test_two_leaves_of_one_name_are_refused(self):
        params = {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}
        with pytest.raises(PatternError, match=r"two leaves.*'a\.b'"):
            optim.partition({"a.b": optim.sgd(0.1)}).init(params)


class TestFreeze:
    @BOTH
    def test_frozen_leaves_stay_and_the_others_move_as_without(self, lower):
        found = steps(lower(optim.freeze("encoder.*", optim.adamw(0.01))))
        free = steps(lower(optim.adamw(0.01)))
        for name in SHAPES:
            assert torch.equal(found[name], tensors(0)[name] if name.startswith("encoder") else free[name])

    @BOTH
    def test_alone_and_in_a_chain(self, lower):
        assert all(torch.equal(p, tensors(0)[name]) for name, p in steps(lower(optim.freeze())).items())
        found = steps(lower(optim.chain(optim.adamw(0.01), optim.freeze("encoder.*"))))
        free = steps(plain(optim.adamw(0.01)))
        for name in SHAPES:
            assert torch.equal(found[name], tensors(0)[name] if name.startswith("encoder") else free[name])


class TestChain:
    def test_is_the_composition(self):
        clip, adamw = optim.clip_by_global_norm(0.5), optim.adamw(0.01)
        params, opt_state = tensors(0), optim.chain(clip, adamw).init(tensors(0))
        assert type(opt_state) is tuple
        found, _ = optim.chain(clip, adamw).apply(tensors(1), opt_state, params)
        clipped, _ = clip.update(tensors(1), clip.init(params), params)
        expected, _ = adamw.apply(clipped, adamw.init(params), params)
        assert all(torch.equal(found[name], expected[name]) for name in SHAPES)

    def test_skip_freezes_the_memory_of_earlier_members(self):
        tx = optim.chain(optim.trace(0.9), optim.scale_by_schedule(optim.linear(1.0, 9, 0.0)), optim.sgd(0.1))
        params = tensors(0)
        _, opt_state = tx.apply(tensors(1), tx.init(params), params)
        for lowering in (tx, plain(tx)):
            _, skipped = lowering.apply(tensors(2), opt_state, params, skip=torch.tensor(True))
            for a, b in zip(lm.tree.leaves(opt_state), lm.tree.leaves(skipped), strict=True):
                assert torch.equal(a, b)

    def test_has_the_fused_lowering_of_its_last_member(self):
        fused, not_fused = optim.adamw(0.1), optim.nadam(0.1)
        assert optim.chain(optim.clip_by_value(1.0), fused).fused_fn is not None
        assert optim.chain(fused, not_fused).fused_fn is None
        assert optim.chain(optim.chain(optim.identity(), fused)).fused_fn is not None

    def test_takes_transforms(self):
        with pytest.raises(ArgumentError, match=r"transforms is a list .* Write: lm\.optim\.chain\(\*transforms\)$"):
            optim.chain([optim.sgd(0.1), optim.sgd(0.1)])


class TestLearningRate:
    def test_is_found_wherever_it_is(self):
        params = tensors(0)
        for tx in (
            optim.sgd(0.25),
            optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.25)),
            optim.partition({"head.*": optim.lion(0.25)}, default=optim.freeze()),
            optim.lookahead(optim.apply_if_finite(optim.rmsprop(0.25), 1)),
            optim.lamb(0.25),
            optim.schedule_free(optim.sgd(0.25)),
        ):
            assert optim.learning_rate(tx.init(params)).item() == 0.25
        assert optim.learning_rate(optim.scale_by_adam().init(params)) is None

    def test_of_a_schedule_is_that_of_the_last_update(self):
        tx = optim.adamw(optim.linear(1.0, 4, 0.0))
        for lowering in (tx, plain(tx)):
            params = tensors(0)
            opt_state = lowering.init(params)
            for expected in (1.0, 0.75, 0.5):
                params, opt_state = lowering.apply(tensors(1), opt_state, params)
                assert optim.learning_rate(opt_state).item() == expected

    def test_can_be_changed_in_the_state(self):
        tx, params = optim.sgd(0.1), tensors(0)
        opt_state = tx.init(params).replace(hparams={"lr": torch.tensor(0.5, dtype=torch.float64)})
        found, _ = tx.apply(tensors(1), opt_state, params)
        expected, _ = optim.sgd(0.5).apply(tensors(1), optim.sgd(0.5).init(params), params)
        assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


def test_schedule_free_evaluation_of_a_partition():
    tx = optim.partition({"head.*": optim.schedule_free(optim.sgd(0.1))}, default=optim.sgd(0.1))
    params = tensors(0)
    opt_state = tx.init(params)
    for step in range(3):
        params, opt_state = tx.apply(tensors(step), opt_state, params)
    evaluated = optim.schedule_free_eval_params(opt_state, params)
    assert [name for name in SHAPES if not torch.equal(evaluated[name], params[name])] == ["head.weight"]
    with pytest.raises(StateError, match="no schedule_free"):
        optim.schedule_free_eval_params(optim.sgd(0.1).init(params), params)
