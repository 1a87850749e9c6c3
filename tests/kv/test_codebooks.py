"""Codewords and the search for the nearest, against all distances in float64."""

from __future__ import annotations

import math
import sys
from importlib.resources import files
from itertools import product

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit.errors import QuantkitError
from quantkit.kv import build_codebooks
from quantkit.kv.build_codebooks import build, lloyd, measure
from quantkit.kv.codebooks import E8_SCALE, SHIPPED, TENSORS, Codebook, digest, e8_shell, load, nearest

BOOKS = [("kmeans", 1), ("e8", 1), ("magnitudes", 2)]
FILE = str(files("quantkit.kv").joinpath(SHIPPED))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "bits", "error", "cosine", "entropy"),
    [
        ("kmeans", 1, 0.3225, 0.8240, (7.97, 8.0)),
        ("e8", 1, 0.3200, 0.8255, (7.95, 8.0)),
        ("magnitudes", 2, 0.0950, 0.9515, (7.88, 7.95)),
    ],
)
def test_the_error_on_normal_numbers(name, bits, error, cosine, entropy):
    """A scalar quantiser reaches 0.3634 and 0.1175, no quantiser less than 0.25 and 0.0625."""
    found = measure(load(name, bits), torch.Generator().manual_seed(7), 2**17)
    assert 0.25**bits < found.error <= error
    assert cosine <= found.cosine
    assert entropy[0] <= found.entropy <= entropy[1]


def test_the_shipped_file_is_what_it_says():
    tensors = load_file(FILE)
    with safe_open(FILE, "pt") as file:
        metadata = file.metadata()
    assert tensors.keys() == set(TENSORS.values())
    assert all(part.dtype == torch.float16 and part.shape == (256, 8) for part in tensors.values())
    assert digest(tensors) == metadata["sha256"] == "f101b32fbfca3b219ff3162b90901bb9843a53142e989892b48fb8517d68950b"
    assert {"builder", "seed", "samples"} <= metadata.keys()
    for name, bits in BOOKS:
        found = measure(load(name, bits), torch.Generator().manual_seed(8), 2**16)
        assert float(metadata[f"{TENSORS[name]}.error"]) == pytest.approx(found.error, rel=0.01)
        assert float(metadata[f"{TENSORS[name]}.cosine"]) == pytest.approx(found.cosine, abs=0.002)
    assert torch.equal(tensors["cb1_e8"], e8_shell())
    assert tensors["cb2_mag"].min() >= 0


def test_the_shell_of_e8():
    shell = e8_shell().double() / E8_SCALE
    norms = shell.square().sum(-1)
    assert (norms[:240] == 2).all()
    assert (norms[240:] == 4).all()
    rows = {tuple(row) for row in shell.tolist()}
    assert len(rows) == 256
    assert {tuple(-value for value in row) for row in rows} == {tuple(value + 0.0 for value in row) for row in rows}
    # Whole lattice: products of minimal vectors are whole numbers, each meets 56 others at 60 degrees.
    products = shell[:240] @ shell[:240].T
    assert set(products.unique().tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert ((products == 1).sum(1) == 56).all()


@pytest.mark.parametrize(("name", "bits"), BOOKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_found_is_nearest(name, bits, dtype):
    book, numbers = load(name, bits), (2 * normal(1250, 64)).to(dtype)
    indices, signs = book.search(numbers)
    assert (indices.shape, indices.dtype) == ((1250, 8), torch.uint8)
    assert (signs is None) == (bits == 1)
    read = book.look_up(indices, signs, torch.float64)
    points, vectors = numbers.double().view(-1, 1, 8), book.vectors.double()
    least = (points.abs() if bits == 2 else points).sub(vectors).square().sum(-1).amin(-1)
    found = (points.squeeze(1) - read.view(-1, 8)).square().sum(-1)
    torch.testing.assert_close(found, least, rtol=1e-5, atol=1e-6)


def test_the_formula_of_e8_finds_each_of_its_vectors():
    shell = e8_shell()
    found, _ = load("e8", 1).search(shell.float())
    assert found.flatten().tolist() == list(range(256))
    points = normal(10_000, 8)
    assert torch.equal(load("e8", 1).search(points)[0].flatten(), nearest(points, shell.double()))


def test_signs_are_bits():
    book = load("magnitudes", 2)
    patterns = torch.tensor(list(product((-1.0, 1.0), repeat=8)))
    indices, signs = book.search(patterns * book.vectors[17].float())
    assert (indices == 17).all()
    expected = [sum(2**j for j in range(8) if row[j] > 0) for row in patterns.tolist()]
    assert signs.flatten().tolist() == expected
    assert torch.equal(book.look_up(indices, signs, torch.float32), patterns * book.vectors[17].float())


@pytest.mark.parametrize(("name", "bits"), BOOKS)
def test_what_is_not_finite_gets_an_index(name, bits):
    numbers = torch.full((3, 16), torch.nan)
    numbers[1], numbers[2, 3] = torch.inf, -torch.inf
    indices, signs = load(name, bits).search(numbers)
    assert load(name, bits).look_up(indices, signs, torch.float32).isfinite().all()
    empty, _ = load(name, bits).search(torch.zeros(0, 4, 16))
    assert empty.shape == (0, 4, 2)


def test_a_file_of_ones_own(tmp_path):
    signed, sizes = normal(256, 8).float(), normal(256, 8).abs()
    save_file({"any": signed}, tmp_path / "signed.safetensors")
    save_file({"any": sizes}, tmp_path / "sizes.safetensors")
    assert torch.equal(load(str(tmp_path / "signed.safetensors"), 1).vectors, signed.half())
    assert torch.equal(load(str(tmp_path / "sizes.safetensors"), 2).vectors, sizes.half())
    assert torch.equal(load(FILE, 2).vectors, load("magnitudes", 2).vectors)
    assert torch.equal(load(FILE, 1).vectors, load("kmeans", 1).vectors)
    assert load("kmeans", 1) is load("kmeans", 1)


@pytest.mark.parametrize(
    ("content", "bits", "message"),
    [
        ({"a": torch.ones(256, 4)}, 2, r"\[256, 4\]; it has to be floating point \[256, 8\]"),
        ({"a": torch.ones(256, 8, dtype=torch.int32)}, 2, "int32"),
        ({"a": torch.full((256, 8), 1e9)}, 2, "float16 does not hold"),
        ({"a": torch.ones(256, 8)}, 1, "holds magnitudes .* given for 1 bits; use e8 or kmeans"),
        ({"a": -torch.ones(256, 8)}, 2, "holds signed codewords .* given for 2 bits"),
        ({"a": torch.ones(1), "b": torch.ones(1)}, 2, "has the tensors a, b; it needs one, or cb2_mag"),
        (b"no safetensors", 2, "no safetensors file"),
        (None, 2, "no such file; use one of kmeans, e8, magnitudes"),
    ],
)
def test_files_that_are_no_codebook(tmp_path, content, bits, message):
    path = tmp_path / "codes.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(content, path)
    with pytest.raises(QuantkitError, match=message):
        load(str(path), bits)


def test_building_learns_and_repeats():
    """Few steps; the target is that of k-means on as many samples that are drawn once."""
    first, again = (lloyd(torch.Generator().manual_seed(3), True, steps=12, samples=8192) for _ in range(2))
    assert torch.equal(first, again)
    found = measure(Codebook("trial", first.half(), 1), torch.Generator().manual_seed(4), 2**15)
    assert found.error < 0.36
    assert lloyd(torch.Generator().manual_seed(3), False, steps=3, samples=4096).min() >= 0


@pytest.mark.slow
def test_building_gives_the_shipped_quality(tmp_path):
    tensors, metadata = build(seed=1)
    assert metadata["sha256"] == digest(tensors)
    with safe_open(FILE, "pt") as file:
        shipped = file.metadata()
    for name in TENSORS.values():
        assert math.isclose(float(metadata[f"{name}.error"]), float(shipped[f"{name}.error"]), rel_tol=0.005)


def test_the_builder_is_a_command(tmp_path, monkeypatch, capsys):
    def quickly(draw, signed):
        return lloyd(draw, signed, steps=2, samples=2048)

    monkeypatch.setattr(build_codebooks, "lloyd", quickly)
    monkeypatch.setattr(build_codebooks, "_TEST_SAMPLES", 4096)
    monkeypatch.setattr(sys, "argv", ["build_codebooks", "--output", str(tmp_path / "made.safetensors"), "--seed", "5"])
    build_codebooks.main()
    said = capsys.readouterr().out
    assert "seed: 5" in said
    assert "cb2_mag.error: 0." in said
    assert f"sha256: {digest(load_file(tmp_path / 'made.safetensors'))}" in said
    assert load(str(tmp_path / "made.safetensors"), 2).bits == 2
