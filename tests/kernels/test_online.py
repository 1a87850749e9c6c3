import pytest
import torch
from handmade import layer_format
from torch import Tensor

from quantkit.formats.layer import LayerInputs
from quantkit.kernels.hadamard import multiply
from quantkit.kernels.online import apply, inverse, kronecker_split, operations, restore
from quantkit.kernels.reference import fake_quantize, transform_input

LEFT, RIGHT = 3, 8
WIDTH = LEFT * RIGHT


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def op(kind: str, dtype: torch.dtype = torch.float64) -> LayerInputs:
    if kind == "hadamard":
        return LayerInputs(signs=normal(WIDTH).sign().to(torch.int8))
    if kind == "kronecker":
        return LayerInputs(left=normal(LEFT, LEFT).to(dtype), right=normal(RIGHT, RIGHT, seed=1).to(dtype))
    return LayerInputs(matrix=normal(WIDTH, WIDTH).to(dtype)) if kind == "dense" else LayerInputs()


def explicit(inputs: LayerInputs) -> Tensor:
    """M [n, n] float64, written out."""
    if inputs.signs is not None:
        h = multiply(torch.eye(WIDTH, dtype=torch.float64)).mT
        return h @ torch.diag(inputs.signs.double()) / WIDTH**0.5
    if inputs.matrix is not None:
        return inputs.matrix.double().mT
    assert inputs.left is not None
    assert inputs.right is not None
    return torch.kron(inputs.left.double(), inputs.right.double()).mT


KINDS = ["hadamard", "kronecker", "dense"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (2, 5, WIDTH), (0, WIDTH)])
def test_is_a_product_with_the_matrix(kind, shape):
    inputs, x = op(kind), normal(*shape, seed=2)
    torch.testing.assert_close(apply(x, inputs), x @ explicit(inputs).mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_with_the_inverse_leave_the_product(kind):
    inputs, x, weight = op(kind), normal(7, WIDTH, seed=2), normal(5, WIDTH, seed=3)
    changed = apply(weight, inverse(inputs))
    torch.testing.assert_close(apply(x, inputs) @ changed.mT, x @ weight.mT, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(restore(changed, inputs), weight, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(restore(weight, inputs), weight @ explicit(inputs), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(changed, weight, atol=1e-2)


def test_nothing_to_do_is_nothing_done():
    x = normal(2, WIDTH)
    assert apply(x, LayerInputs()) is x
    assert restore(x, LayerInputs()) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits_are_rounded_once(kind, dtype):
    inputs, x = op(kind, dtype), normal(50, WIDTH).to(dtype)
    found, want = apply(x, inputs), x.double() @ explicit(inputs).mT
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), want, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-5)


def test_sums_do_not_overflow_in_float16():
    x = torch.full((1, 4096), 1000.0, dtype=torch.float16)  # the sum is beyond 65504, the result is not
    assert apply(x, LayerInputs(signs=torch.ones(4096, dtype=torch.int8)))[0, 0] == 64000


def test_comes_behind_scale_and_shift_and_before_rounding():
    scheme = layer_format("W4A4").activations
    scale, shift, x = normal(WIDTH).exp(), normal(WIDTH, seed=1), normal(3, WIDTH, seed=2)
    signs = op("hadamard").signs
    found = transform_input(x, LayerInputs(scale=scale, shift=shift, signs=signs), scheme)
    assert scheme is not None
    assert torch.equal(found, fake_quantize(apply(x * scale + shift, LayerInputs(signs=signs)), scheme))


def test_singular_factors_are_said():
    with pytest.raises(torch.linalg.LinAlgError):
        inverse(LayerInputs(left=torch.zeros(2, 2), right=torch.eye(3)))
    with pytest.raises(torch.linalg.LinAlgError):
        inverse(LayerInputs(matrix=torch.ones(3, 3)))


def test_operations_per_token():
    assert operations(layer_format("W4A4"), 4096) == 0
    assert operations(layer_format("W4A4", input_op="hadamard"), 4096) == 4096 * 14
    kronecker = layer_format("W4A4", input_op="kronecker", input_left=32)
    assert operations(kronecker, 4096) == 2 * (32**2 * 128 + 32 * 128**2)
    assert operations(layer_format("W4A4", input_op="dense"), 100) == 20000


@pytest.mark.parametrize(
    ("size", "pair"),
    [(4096, (64, 64)), (5120, (64, 80)), (8192, (64, 128)), (11008, (86, 128)), (14336, (112, 128)), (896, (28, 32)),
     (13696, (107, 128)), (2560, (32, 80)), (18944, (128, 148)), (6, (2, 3)), (1, (1, 1)), (8191, (1, 8191))],
)  # fmt: skip
def test_balanced_factors(size, pair):
    assert kronecker_split(size) == pair


def test_factors_of_every_size():
    for size in range(1, 3000):
        left, right = kronecker_split(size)
        assert left * right == size
        assert left <= right


@pytest.mark.parametrize("size", [224, 64, 14])
def test_is_compiled_as_one_graph_that_holds_the_matrices(size):
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    signs = normal(size).sign().to(torch.int8)
    compiled = torch.compile(lambda x, signs: apply(x, LayerInputs(signs=signs)), backend=backend, fullgraph=True)
    x = normal(3, size, seed=1).float()
    torch.testing.assert_close(compiled(x, signs), apply(x, LayerInputs(signs=signs)))
    assert len(graphs) == 1
    assert len(graphs[0].graph.nodes) < 25  # none of the construction of a base
