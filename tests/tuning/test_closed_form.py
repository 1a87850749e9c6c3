"""The closed form against autograd on the objective it minimises, and on a real block."""

import pytest
import torch
from opened import Opened
from torch import Tensor

from quantkit.calibrate.streams import Streams
from quantkit.tuning.closed_form import Reader, readers_of, solve_norm

WIDTH, TOKENS = 24, 200


def problem(dual: bool) -> tuple[list[Reader], list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """Readers and, per reader, (X, Y, W, Q), float64; the second one sees only a part of the tokens, as experts do."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, WIDTH).double()
    x += torch.linspace(-1, 2, WIDTH).double()
    y = x + 0.1 * torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64) if dual else x
    data, readers = [], []
    for rows, tokens in ((40, TOKENS), (16, TOKENS // 3)):
        weight = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
        rounded = (weight * 1.5).round() / 1.6
        seen, wanted = x[:tokens], y[:tokens]
        data.append((seen, wanted, weight, rounded))
        moments = {"moment": seen.t() @ seen, "cross": seen.t() @ wanted, "tokens": tokens}
        readers.append(Reader(rounded, weight, total=seen.sum(dim=0), target_total=wanted.sum(dim=0), **moments))
    return readers, data


def objective(data: list[tuple[Tensor, Tensor, Tensor, Tensor]], s: Tensor, t: Tensor) -> Tensor:
    return sum(((y @ w.t() - (x * s + t) @ q.t()).square().sum() for x, y, w, q in data), torch.zeros(()).double())


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dual", [False, True])
def test_the_gradient_is_zero_at_the_solution(dual, shift):
    readers, data = problem(dual)
    s, t = solve_norm(readers, 0.0, shift=shift)
    assert (t is not None) == shift
    point = [s.clone().requires_grad_(), (torch.zeros_like(s) if t is None else t.clone()).requires_grad_()]
    objective(data, *point).backward()
    start = [torch.ones_like(s).requires_grad_(), torch.zeros_like(s).requires_grad_()]
    objective(data, *start).backward()
    for after, before in list(zip(point, start, strict=True))[: 2 if shift else 1]:
        assert after.grad is not None
        assert before.grad is not None
        assert after.grad.norm() < 1e-8 * before.grad.norm()


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_never_further_from_the_target_and_a_pull_keeps_it_near(ridge, shift):
    readers, data = problem(dual=True)
    s, t = solve_norm(readers, ridge, shift=shift)
    t = torch.zeros_like(s) if t is None else t
    before = objective(data, torch.ones_like(s), torch.zeros_like(s))
    assert objective(data, s, t) < before
    free, _ = solve_norm(readers, 0.0, shift=shift)
    assert ridge == 0 or (s - 1).norm() < (free - 1).norm()


def test_nothing_rounded_or_nothing_seen_changes_nothing():
    readers, _ = problem(dual=False)
    for reader in readers:
        reader.rounded.copy_(reader.weight)
    s, t = solve_norm(readers, 0.01, shift=True)
    assert t is not None
    torch.testing.assert_close(s, torch.ones_like(s))
    torch.testing.assert_close(t, torch.zeros_like(t), rtol=0, atol=1e-9)
    empty = [Reader(r.rounded, r.weight, *(torch.zeros_like(v) for v in (r.moment, r.cross, r.total, r.total)), 0)
             for r in readers]  # fmt: skip
    s, t = solve_norm(empty, 0.01, shift=True)
    assert t is not None
    assert torch.equal(s, torch.ones_like(s))
    assert not t.any()


@pytest.mark.parametrize("from_float", [False, True])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_readers_hold_what_the_linears_of_a_block_read(tiny, name, from_float):
    model = Opened(tiny(name))
    ids = torch.randint(3, 190, (4, 9), generator=torch.Generator().manual_seed(0))
    site = model.skeleton.sites(1)[1]
    streams = Streams(model.stream, ids, names=("float", "quantised"), batch_size=3)
    harmed = model.block(0)
    with torch.no_grad():
        for parameter in harmed.parameters():
            parameter *= 1.1
    streams.advance({"float": model.block(0), "quantised": harmed})
    module, reference = model.block(1), model.block(1)
    with torch.no_grad():
        module.get_submodule(site.consumers[0]).weight.mul_(0.9)
    readers = readers_of(site, module, reference, streams, from_float=from_float)
    outputs: dict[str, list[Tensor]] = {"float": [], "quantised": []}
    for stream, block in (("quantised", module), ("float", reference)):
        handle = block.get_submodule(site.producer).register_forward_hook(
            lambda _, __, output, stream=stream: outputs[stream].append(output.flatten(0, -2).double())
        )
        for number in range(streams.batches):
            streams.run(stream, number, block)
        handle.remove()
    x = torch.cat(outputs["quantised"])
    y = torch.cat(outputs["float"]) if from_float else x
    assert len(readers) == len(site.consumers)
    torch.testing.assert_close(readers[0].rounded, readers[0].weight * 0.9)
    for reader in readers:
        assert reader.tokens == len(x)
        for found, expected in [
            (reader.moment, x.t() @ x),
            (reader.cross, x.t() @ y),
            (reader.total, x.sum(dim=0)),
            (reader.target_total, y.sum(dim=0)),
        ]:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
