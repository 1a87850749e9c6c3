"""The kernels of single heads in Triton's interpreter, against ``kernels/online.py`` and ``kv/quantiser.py``."""

import pytest
import torch
from torch import Tensor

from quantkit.formats.layer import LayerInputs
from quantkit.kernels import online
from quantkit.kernels.triton import compat, configs, heads
from quantkit.kv.cache import QuantisedLayer
from quantkit.kv.interface import LayerKV
from quantkit.kv.quantiser import MinMax
from quantkit.kv.rotation import KeyMatrix, RandomHadamard

pytestmark = pytest.mark.usefixtures("interpreted_inputs", "poisoned")

DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture
def on_gpu(monkeypatch):
    """Keys and values are taken for those on a GPU."""
    monkeypatch.setattr(heads, "turns", lambda x: x.dtype in DTYPES)
    monkeypatch.setattr(heads, "encodes", lambda x: x.dtype != torch.float64)


@pytest.fixture
def eight(monkeypatch):
    """Eight vectors at once, however few there are: the interpreter takes programs one after another."""
    tile = heads.tile
    monkeypatch.setattr(
        heads, "tile", lambda *sizes, product: tile(*sizes, product=product)._replace(rows=8 + 8 * product)
    )


def states(shape, dtype=torch.float32):
    """Vectors that differ by a lot, with one side longer, the largest number in the last channel of some: what a mask
    that is one short, another vector's range or a lost sign would change."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.3
    x *= torch.logspace(-1, 1, shape[-2])[:, None]
    x[..., 1::3, -1] *= -5
    return x.to(dtype)


def views(batch, count, tokens, dim, dtype):
    """[batch, heads, tokens, dim]: in one piece, as attention hands keys over, a part of longer ones, and apart."""
    wide = states((batch, tokens, count, dim + 8), dtype)
    yield wide[..., :dim].transpose(1, 2).contiguous()
    yield wide[..., :dim].transpose(1, 2)
    yield wide[..., 8:].transpose(1, 2)[:, :, 1:]
    yield torch.stack([wide, wide], dim=-1)[..., :dim, 0].transpose(1, 2)


def ulps(y: Tensor, want: Tensor) -> float:
    """The largest difference, in last digits of the largest number of each vector."""
    digits = torch.finfo(y.dtype).eps * want.double().abs().amax(-1, keepdim=True)
    return float(((y.double() - want.double()).abs() / digits).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
def test_products_are_those_of_the_reference(on_gpu, eight, dim, dtype):
    """Of a Hadamard matrix and of a dense one, whose inverse 16 bits do not hold, and their inverses."""
    dense = torch.eye(dim) + torch.randn(dim, dim) / dim
    for transform in (RandomHadamard("1 2"), KeyMatrix(dense.to(dtype)), KeyMatrix(dense)):
        inputs = transform._inputs if isinstance(transform, KeyMatrix) else transform._signs(torch.empty(dim))
        inverse = transform._inverse if isinstance(transform, KeyMatrix) else inputs
        for x in views(1, 2, 4, dim, dtype) if dim == 64 else [states((1, 3, 2, dim), dtype)]:
            turned = transform.apply(x)
            assert turned.shape == x.shape
            want = online.apply(x.double(), inputs)
            assert ulps(turned, want) < 0.6  # half a digit: rounded once
            assert ulps(transform.undo(x), online.restore(x.double(), inverse)) < 0.6
    assert len(list(transform.tensors())) == 2 + 4  # both, each of two parts
    assert ulps(transform.undo(transform.apply(x)), x) < 3


def test_hadamard_matrices_are_held_exactly():
    for dim, parts in ((128, 1), (96, 1), (12, 1), (14, 2)):
        signs = LayerInputs(signs=torch.ones(dim, dtype=torch.int8))
        rows = online.apply(torch.eye(dim, dtype=torch.float64), signs)
        matrix = heads.matrix_of(rows, torch.bfloat16, dim**-0.5)
        assert 1 + (matrix.low is not None) == parts
        if parts == 1:
            assert torch.equal(matrix.high.abs(), torch.ones(dim, dim, dtype=torch.bfloat16))


def same(parts: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return parts.keys() == want.keys() and all(
        (part.shape, part.dtype) == (want[name].shape, want[name].dtype) and torch.equal(part, want[name])
        for name, part in parts.items()
    )


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, False), (3, True), (4, False), (4, True), (5, False),
                                                 (6, True), (7, False), (8, False), (8, True)])  # fmt: skip
def test_what_is_stored_is_what_the_reference_stores(eight, bits, symmetric):
    for dtype, dim in ((torch.float16, 128), (torch.bfloat16, 80), (torch.float32, 64)):
        x = states((2, 1, 6, dim), dtype)
        assert same(heads.encode(x, bits, symmetric, 1.0, 1.0), MinMax(bits, symmetric).encode(x))


def test_vectors_may_lie_anywhere():
    for x in views(2, 2, 2, 32, torch.float16):
        assert same(heads.encode(x, 4, False, 1.0, 1.0), MinMax(4).encode(x))


@pytest.mark.parametrize("dim", [1, 5, 31, 33, 200, 256])
def test_widths_that_fill_no_word(eight, dim):
    x = states((1, 2, 3, dim))
    for bits in (2, 3, 8):
        assert same(heads.encode(x, bits, False, 1.0, 1.0), MinMax(bits).encode(x))


@pytest.mark.parametrize("symmetric", [False, True])
def test_shares_of_ranges_as_numbers_and_as_tensors(eight, symmetric):
    x = states((1, 2, 5, 64))
    low, high = 0.71, torch.tensor([0.3, 0.62])[1]
    want = MinMax(3, symmetric, low, high).encode(x)
    for given in ((low, high), (torch.tensor(low), 0.62), (torch.tensor(low).double(), high)):
        assert same(heads.encode(x, 3, symmetric, *given), want)
    assert not torch.equal(want["codes"], MinMax(3, symmetric, high, low).encode(x)["codes"])


@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_at_their_ends(eight, symmetric):
    """Zeros, one sign alone, numbers around the smallest and the largest scale, ties."""
    rows = [torch.zeros(32), torch.rand(32) + 1, -torch.rand(32) - 1, torch.randn(32) * 1e-9, torch.randn(32) * 1e-30,
            torch.randn(32) * 1e7, torch.arange(32.0) - 15.5, torch.arange(32.0) / 2 - 3.75]  # fmt: skip
    x = torch.stack(rows)[None, None]
    assert same(heads.encode(x, 4, symmetric, 1.0, 1.0), MinMax(4, symmetric).encode(x))


def test_what_is_no_number_stays_in_its_vector():
    x = states((1, 1, 3, 64))
    clean = heads.encode(x, 4, False, 1.0, 1.0)
    x[0, 0, 1, 63] = float("nan")
    parts = heads.encode(x, 4, False, 1.0, 1.0)
    assert parts["scale"][0, 0, 1].isnan().all()
    for name, part in parts.items():
        assert torch.equal(part[:, :, ::2], clean[name][:, :, ::2])


@pytest.mark.parametrize("count", [1, 4100])
def test_many_vectors_go_in_larger_tiles(count):
    assert (heads.tile(64, count, product=False).rows == 1) == (count == 1)
    assert heads.tile(256, 4096, product=True).columns == 64
    if count > 1:
        x = states((1, 2, count // 2 + 1, 16), torch.float16)
        assert x.shape[:3].numel() > 4096
        assert same(heads.encode(x, 4, False, 1.0, 1.0), MinMax(4).encode(x))
        matrix = heads.matrix_of(torch.eye(16, dtype=torch.float64).flip(0), torch.float16)
        assert torch.equal(heads.multiply(x, matrix), x.flip(-1))


def test_nothing():
    empty = torch.empty(1, 2, 0, 64, dtype=torch.float16)
    assert heads.multiply(empty, heads.matrix_of(torch.eye(64), torch.float16)).shape == empty.shape
    assert heads.encode(empty, 4, False, 1.0, 1.0)["codes"].shape == (1, 2, 0, 8)


@pytest.mark.parametrize("transform", [RandomHadamard("0 0"), KeyMatrix(torch.eye(64) + 0.01)])
def test_a_cache_stores_what_it_did(on_gpu, eight, monkeypatch, transform):
    """Token by token and at once, through the kernels and without them."""
    keys, values = states((1, 2, 6, 64), torch.float16), states((1, 2, 6, 64), torch.float16) * 2
    launched = []
    encode = heads.encode
    monkeypatch.setattr(heads, "encode", lambda *arguments: launched.append(arguments) or encode(*arguments))
    layer, whole = (QuantisedLayer(LayerKV(MinMax(4), MinMax(3, True), transform)) for _ in range(2))
    for token in range(6):
        found = layer.update(keys[:, :, token : token + 1], values[:, :, token : token + 1])
    assert all(torch.equal(*pair) for pair in zip(found, whole.update(keys, values), strict=True))
    assert len(launched) == 14
    monkeypatch.setattr(heads, "turns", lambda x: False)
    monkeypatch.setattr(heads, "encodes", lambda x: False)
    reference = QuantisedLayer(LayerKV(MinMax(4), MinMax(3, True), transform)).update(keys, values)
    assert torch.equal(found[1], reference[1])
    # A sum in another order may end in another last digit, and that in another code.
    assert float((found[0] - reference[0]).abs().gt(2e-3 * keys.abs().amax(-1, keepdim=True)).float().mean()) < 0.01


def test_gradients_take_the_reference(on_gpu):
    x = states((1, 1, 2, 32), torch.float16).requires_grad_()
    RandomHadamard("1").apply(x).sum().backward()
    assert x.grad is not None
    matrix = torch.eye(32).requires_grad_()
    KeyMatrix(matrix, torch.eye(32)).apply(x.detach()).sum().backward()
    assert matrix.grad is not None


def test_operators_have_shapes_without_data_and_pass_opcheck():
    x = states((1, 1, 2, 32), torch.float16)
    torch.library.opcheck(torch.ops.quantkit.turn_heads.default, (x, torch.eye(32).half(), None, 0.5))
    for symmetric in (True, False):
        torch.library.opcheck(torch.ops.quantkit.encode_heads.default, (x, None, None, 1.0, 1.0, 3, symmetric))


def test_says_what_it_takes(monkeypatch):
    class Fake:
        is_cuda = True

        def __init__(self, dtype, dim, device="cuda"):
            self.dtype, self.shape, self.device = dtype, (1, 1, 1, dim), torch.device(device)

    monkeypatch.setattr(compat, "AVAILABLE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(configs, "device_of", lambda device: configs.Device("sm_90", 132))
    assert heads.turns(Fake(torch.bfloat16, 128))
    assert heads.encodes(Fake(torch.float32, 256))
    assert not heads.turns(Fake(torch.float32, 128))
    assert not heads.encodes(Fake(torch.float64, 128))
    assert not heads.turns(Fake(torch.float16, 257))
    assert not heads.encodes(torch.empty(1, 1, 1, 64))
    monkeypatch.setattr(configs, "device_of", lambda device: configs.Device("sm_75", 132))
    assert not heads.turns(Fake(torch.bfloat16, 128))
