"""A part of a block run again with stand-ins is the part with those weights, and is left as it was."""

from __future__ import annotations

import pytest
import torch
from opened import Opened
from tiny_models import TINY

from quantkit.calibrate.replay import Replay, Substitute, owner_of
from quantkit.calibrate.session import Session
from quantkit.pipeline import prepare
from quantkit.presets import expand


def session_of(folder, batch_size=3, nsamples=7):
    samples = {"nsamples": nsamples, "seqlen": 12, "batch_size": batch_size}
    plan, skeleton, checkpoint = prepare(str(folder), expand(method="gptq", scheme="W4A16G32", calibration=samples))
    return Session(plan, skeleton, checkpoint, pytest.fail)


def noisy(model, index, site):
    """Path -> stand-in with slightly other weights, for every consumer that is a linear."""
    generator = torch.Generator().manual_seed(0)
    tensors = model.skeleton.read_block(index, model.checkpoint).tensors
    found = {}
    for name in set(site.consumers) & set(model.linears(index)):
        weight = tensors[f"{name}.weight"]
        weight = weight + 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
        found[name] = Substitute(weight, tensors.get(f"{name}.bias"))
    return found


@pytest.mark.parametrize("name", TINY)
def test_stand_ins_do_what_changed_weights_do(source, name):
    model = Opened(source(name))
    with session_of(source(name)) as session:
        module = model.block(0)
        replay_of = session.replays(module, model.linears(0))
        for site in model.skeleton.sites(0):
            replay = replay_of(site, 36)
            if not replay.tokens:  # an expert that no token chose
                continue
            stand_ins = noisy(model, 0, site)
            assert replay.error({}) == 0
            error = replay.error(stand_ins)
            assert 0 < error < 1
            for path, stand_in in stand_ins.items():
                module.get_submodule(path).weight.data = stand_in.weight
            changed = list(replay.outputs({}))  # the same calls, now with the weights in place
            for ours, theirs in zip(replay.outputs(stand_ins), changed, strict=True):
                assert torch.equal(ours, theirs)
            tensors = model.skeleton.read_block(0, model.checkpoint).tensors
            for path in stand_ins:
                module.get_submodule(path).weight.data = tensors[f"{path}.weight"]
            assert replay.error({}) == 0


@pytest.mark.parametrize("name", ["gemma2", "bloom"])
def test_the_tokens_are_those_of_the_first_samples_whatever_the_batch(source, name):
    model = Opened(source(name))
    site = next(site for site in model.skeleton.sites(1) if site.name == "attention.input")
    errors = []
    for batch_size in (1, 3, 7, 12):
        with session_of(source(name), batch_size) as session:
            replay = session.replays(model.block(1), model.linears(1))(site, 50)
            assert replay.tokens == 60  # five samples of 12
            errors.append(replay.error(noisy(model, 1, site)))
    assert errors == pytest.approx([errors[0]] * 4, rel=1e-4)


def test_linears_that_read_one_tensor_change_it_once():
    part = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4), "k": torch.nn.Linear(4, 4)})
    calls = []

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part = part

        def forward(self, x):
            return self.part["q"](x) + self.part["k"](x)

    def change(x):
        calls.append(x)
        return 2 * x

    from quantkit.calibrate.replay import Call

    x = torch.randn(2, 3, 4)
    replay = Replay(Both(), "attn.", [Call((x,), {}, None)])
    stand_ins = {f"attn.part.{n}": Substitute(part[n].weight / 2, part[n].bias, change) for n in "qk"}
    assert replay.error(stand_ins) < 1e-12
    assert len(calls) == 1
    broken = {"attn.part.q": Substitute(part["q"].weight * torch.nan, None)}
    assert replay.error(broken) == float("inf")
    assert "forward" not in vars(part["q"])


def test_owners(tiny):
    def owners(name):
        return {site.name: owner_of(site) for site in Opened(tiny(name)).skeleton.sites(0) if site.kind != "linear"}

    assert owners("llama") == {"attention.input": "self_attn", "mlp.input": "mlp"}
    assert owners("opt") == {"attention.input": "self_attn", "mlp.input": ""}
    assert owners("mixtral") == {"attention.input": "self_attn", "mlp.input": "mlp"}
    assert owners("gpt_neox") == {"attention.input": "attention", "mlp.input": "mlp"}
    assert owners("bert") == {"attention.input": "attention.self", "mlp.input": "intermediate"}
