"""Run as a script: logits of checkpoints in a process that has seen nothing of how they were made.

    python fresh_logits.py LOADER OUTPUT.safetensors FOLDER...

LOADER: ``transformers`` (quantkit is not imported), ``native`` (transformers after ``import quantkit``) or ``quantkit``
(``quantkit.load``). The logits of FOLDER are stored under its name. quantkit's layers run through the reference, which
can be compared to the last digit on every machine.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

PROMPT = torch.tensor([[5, 17, 150, 3, 44, 81, 81, 9], [60, 2, 33, 120, 7, 7, 190, 18]])


@torch.inference_mode()
def logits_of(loader: str, folder: Path) -> torch.Tensor:
    """float32 [2, 8, vocabulary], of a classifier [2, labels]; fails on missing or unexpected tensors."""
    if loader == "quantkit":
        import quantkit
        from quantkit.kernels.dispatch import only_reference

        model, _ = quantkit.load(folder)
        with only_reference():
            return model(PROMPT).logits.float()
    if loader == "native":
        import quantkit.kernels.dispatch
    import transformers

    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    model, info = getattr(transformers, name).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"], (folder, info["missing_keys"])
    assert not info["unexpected_keys"], (folder, info["unexpected_keys"])
    if loader == "native":
        with quantkit.kernels.dispatch.only_reference():
            return model(PROMPT).logits.float()
    if loader == "transformers":
        assert "quantkit" not in sys.modules
    return model(PROMPT).logits.float()


if __name__ == "__main__":
    kind, output, *folders = sys.argv[1:]
    save_file({Path(folder).name: logits_of(kind, Path(folder)).contiguous() for folder in folders}, output)
