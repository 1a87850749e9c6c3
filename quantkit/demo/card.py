"""The card of the demo model, from the figures of its training."""

from pathlib import Path
from typing import Any

from quantkit.demo.heldout import EVALUATION_WINDOW
from quantkit.demo.untrained import (
    BOS,
    EOS,
    HEAD_DIM,
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    KEY_VALUE_HEADS,
    LAYERS,
    MAX_POSITIONS,
    QUERY_HEADS,
    VOCAB_SIZE,
)

CARD = """\
---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language:
- en
pipeline_tag: text-generation
library_name: transformers
---

# quantkit demo model

A Llama-architecture language model of {parameters:,} parameters ({megabytes:.1f} MB in bf16), trained on the text
of the Python standard library. It exists to be quantised: small enough to ship inside a package, trained enough that
damage to its weights shows in its held-out perplexity. It knows nothing but the look of Python documentation and code.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from quantkit.demo import model_path

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path())
    output = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=48, do_sample=False)
    print(tokenizer.decode(output[0]))

| | |
|---|---|
| Layers, hidden, intermediate | {layers}, {hidden}, {intermediate} |
| Query heads / key-value heads, head size | {query_heads} / {kv_heads}, {head_dim} |
| Vocabulary | {vocab}, byte-level BPE learned from the training text only |
| Embeddings | tied: at this size that leaves more of the bytes to the layers |
| Positions | {positions} |

The tokenizer adds no special tokens by itself. In training each document stood between `{bos}` and `{eos}`.

## Data

The standard library of CPython {python}: {files} files, {documents:,} documents, {tokens_in_corpus:,} tokens. The
documents are the help topics of `pydoc_data`, the docstrings of each module set out as prose, and the module sources.
Tests, IDLE, the codec tables and vendored packages are left out. {heldout_files} further files, chosen by a hash of
their path, are held out of the training of both the model and its tokenizer; `heldout.txt` beside this folder holds
their openings (at most 12,000 characters of each), and `calibration.txt` holds excerpts of the training text.

The text of the standard library, and so those two files, is under the
[PSF License Agreement](https://docs.python.org/3/license.html),
copyright (c) 2001 onwards Python Software Foundation. All rights reserved. The weights are offered on the same terms.

## Training

{step:,} steps of {batch_size} windows of {window} tokens: {tokens_seen:,} tokens, {epochs:.1f} passes over the text.
AdamW (betas {beta1}, {beta2}; weight decay {weight_decay} on matrices; gradient norm clipped at {clip}), peak learning
rate {lr:g} after {warmup} warm-up steps, held, then a half-cosine fall to zero over the last {decay:.0%} of
{steps:,} steps; seed {seed}; {precision}. It took {minutes:.0f} minutes on a CPU,
with PyTorch {torch} and transformers {transformers}.

    {command}

repeats it. Another machine or another Python release gives slightly different weights and figures.

## Evaluation

On `heldout.txt`, in non-overlapping windows of {eval_window} tokens ({scored:,} tokens scored; the first of each
window is not), with the saved bf16 weights run in float32:

| | perplexity |
|---|---|
| this model | {ppl:.2f} |
| unigram model of the training tokens, add-one smoothing | {unigram:.1f} |

That is {bpb:.3f} bits per byte. `training.json` holds the same figures.

Greedy text is weak: of {contexts} continuations of held-out text (32 tokens of context, 48 tokens generated),
{loops} end in a loop of at most 8 tokens. From a prompt of one or two words it loops more often still. Judge a
quantised model by its perplexity, not by its greedy text.
"""


def write_card(folder: Path, report: dict[str, Any], command: str) -> None:
    """Write ``README.md`` into ``folder`` from ``report``, the content of ``training.json``.

    Args:
        command: repeats the run.
    """
    figures = report["heldout"]
    card = CARD.format(
        parameters=report["parameters"],
        megabytes=report["bytes"] / 1e6,
        layers=LAYERS,
        hidden=HIDDEN_SIZE,
        intermediate=INTERMEDIATE_SIZE,
        query_heads=QUERY_HEADS,
        kv_heads=KEY_VALUE_HEADS,
        head_dim=HEAD_DIM,
        vocab=VOCAB_SIZE,
        positions=MAX_POSITIONS,
        bos=BOS,
        eos=EOS,
        python=report["python"],
        files=report["training_files"],
        documents=report["training_documents"],
        tokens_in_corpus=report["training_tokens"],
        heldout_files=len(report["heldout_files"]),
        step=report["step"],
        batch_size=report["batch_size"],
        window=report["window"],
        tokens_seen=report["tokens_seen"],
        epochs=report["tokens_seen"] / report["training_tokens"],
        beta1=report["betas"][0],
        beta2=report["betas"][1],
        weight_decay=report["weight_decay"],
        clip=report["clip_norm"],
        lr=report["learning_rate"],
        warmup=report["warmup_steps"],
        decay=report["decay_share"],
        steps=report["steps"],
        seed=report["seed"],
        command=command,
        precision=report["precision"],
        minutes=report["seconds"] / 60,
        torch=report["torch"],
        transformers=report["transformers"],
        eval_window=EVALUATION_WINDOW,
        scored=figures["scored_tokens"],
        ppl=figures["perplexity"],
        unigram=figures["unigram_perplexity"],
        bpb=figures["bits_per_byte"],
        loops=figures["greedy_loops"],
        contexts=figures["greedy_contexts"],
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
