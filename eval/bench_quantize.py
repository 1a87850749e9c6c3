"""Memory, speed and storage of quantising, measured: ``python -m quantkit.eval.bench_quantize``.

Each run is a fresh process on a random-weight Llama checkpoint that is written to disk shard by shard. Prints a
Markdown table and, with ``--output``, one JSON file with the figures, the machine and the versions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.eval.environment import environment

HIDDEN, INTERMEDIATE, VOCAB = 1024, 2816, 32000
HEADS, KV_HEADS = 16, 4


def write_random_llama(
    folder: Path,
    blocks: int,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
) -> int:
    """A bf16 Llama checkpoint with Gaussian weights, a shard per block; returns how many weights its linears have."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=VOCAB, architectures=["LlamaForCausalLM"], dtype="bfloat16",
        tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    kv = hidden // heads * kv_heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden), "mlp.down_proj": (hidden, intermediate),
    }  # fmt: skip
    norms = ("input_layernorm", "post_attention_layernorm")
    weight_map: dict[str, str] = {}

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    def gaussian(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(torch.bfloat16)

    for block in range(blocks):
        prefix = f"model.layers.{block}."
        tensors = {f"{prefix}{name}.weight": gaussian(*shape) for name, shape in shapes.items()}
        tensors |= {f"{prefix}{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
        write(block + 2, tensors)
    write(1, {
        "model.embed_tokens.weight": gaussian(VOCAB, hidden), "lm_head.weight": gaussian(VOCAB, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    })  # fmt: skip
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return blocks * sum(rows * columns for rows, columns in shapes.values())


def write_large_block(folder: Path) -> Path:
    """One block of Llama-3-8B's shape, with the tokenizer of the demo model; returns ``folder``."""
    import quantkit.demo

    write_random_llama(folder, 1, hidden=4096, intermediate=14336, heads=32, kv_heads=8)
    for file in quantkit.demo.model_path().glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def run_quantize(source: Path, output: Path, method: str, scheme: str, flags: Sequence[str] = ()) -> dict[str, Any]:
    """``quantkit quantize`` in a process of its own: what ``--json`` prints, and seconds of each block."""
    return _run(source, output, ["--method", method, "--scheme", scheme, *flags])


def run_recipe(source: Path, output: Path, recipe: Path) -> dict[str, Any]:
    """As ``run_quantize``, with a recipe file."""
    return _run(source, output, ["--recipe", str(recipe)])


def _run(source: Path, output: Path, flags: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "quantkit", "quantize", str(source), "-o", str(output), "--overwrite", "--json"]
    command += flags
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    events = [json.loads(line) for line in (output / "quantkit-run.jsonl").read_text().splitlines()]
    blocks = [event for event in events if "block" in event]
    result["block_seconds"] = [event["seconds"] for event in blocks]
    result["block_cpu_seconds"] = [event["cpu_seconds"] for event in blocks]
    return result


def memory_and_speed(
    folder: Path, depths: list[int], methods: list[str], scheme: str, rounds: int
) -> list[dict[str, Any]]:
    """Peak RSS at each depth, and million weights per second; methods alternate, to share the machine's moods."""
    rows = []
    for depth in depths:
        weights = write_random_llama(folder / f"llama-{depth}", depth)
        runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        for _ in range(rounds):
            for method in methods:
                runs[method].append(run_quantize(folder / f"llama-{depth}", folder / "out", method, scheme))
        for method in methods:
            seconds = statistics.median(run["seconds"] for run in runs[method])
            in_blocks = statistics.median(sum(run["block_seconds"]) for run in runs[method])
            rows.append({
                "blocks": depth, "method": method, "scheme": scheme, "weights": weights,
                "peak_rss_mb": round(max(run["peak_rss_bytes"] for run in runs[method]) / 1e6, 1),
                "seconds": round(seconds, 2), "seconds_in_blocks": round(in_blocks, 2),
                "mweights_per_s": round(weights / in_blocks / 1e6, 1),
            })  # fmt: skip
            print(rows[-1], file=sys.stderr)
    return rows


def storage(folder: Path, source: Path) -> list[dict[str, Any]]:
    """Stored bits per weight against bits + 16/group (+ bits/group for a zero point)."""
    rows = []
    for bits in (4, 3, 2):
        for group in (32, 64, 128):
            result = run_quantize(source, folder / "out", "rtn", f"W{bits}A16G{group}")
            symmetric = bits == 4
            formula = bits + (16 + (0 if symmetric else bits)) / group
            stored = round(result["bits_per_weight"], 4)
            rows.append({"scheme": f"W{bits}A16G{group}", "stored": stored, "formula": round(formula, 4)})
            print(rows[-1], file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m quantkit.eval.bench_quantize", description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--methods", nargs="+", default=["rtn", "sinq"])
    parser.add_argument("--scheme", default="W4A16G64")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        speed = memory_and_speed(folder, args.depths, args.methods, args.scheme, args.rounds)
        stored = storage(folder, folder / f"llama-{args.depths[0]}")
    for title, rows in (("memory and speed", speed), ("bits per weight", stored)):
        print(f"\n{title}\n\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(str(value) for value in row.values()) + " |")
    if args.output:
        report = {
            "command": "python -m quantkit.eval.bench_quantize " + " ".join(sys.argv[1:]),
            "environment": environment(),
            "memory_and_speed": speed, "bits_per_weight": stored,
        }  # fmt: skip
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
