"""``quantkit generate``: let a model speak."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from quantkit.cli.loaded import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    KVOption,
    ModelArgument,
    TrustOption,
    cache_as_json,
    cache_in_words,
    load_model,
)
from quantkit.errors import RecipeError

EXAMPLES = """Examples:

quantkit generate out "Once upon a time"

quantkit generate out "Write a haiku about rounding" --chat --temperature 0.7 --seed 1

quantkit generate out "Once upon a time" --kv kivi-2bit

quantkit generate demo "def main(" --max-new-tokens 32 --json
"""


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="text to continue, or the message with --chat")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="stop after so many tokens")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token")] = 0.0,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt into the model's chat template")] = False,
    kv: KVOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue PROMPT with MODEL; the text is shown while it is made."""
    import torch
    from transformers import TextStreamer

    from quantkit.cli.console import print_json, say
    from quantkit.kv.attach import kv_cache, kv_format
    from quantkit.loading import check_writes_text

    loaded, tokenizer = load_model(model, dtype, device, trust_remote_code, kv)
    check_writes_text(loaded, "generating text")
    inputs = _encode(tokenizer, prompt, chat).to(loaded.device)
    length = inputs["input_ids"].shape[1]
    _check_length(loaded, length, max_new_tokens)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    cache = kv_cache(loaded) if kv_format(loaded) else None
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    started = time.perf_counter()
    output = loaded.generate(
        **inputs, **sampling, max_new_tokens=max_new_tokens, streamer=streamer, past_key_values=cache,
        pad_token_id=_pad_id(loaded, tokenizer),
    )[0]  # fmt: skip
    seconds = time.perf_counter() - started
    new = output[length:]
    if as_json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        result = {"model": model, "prompt": prompt, "text": text, "tokens": len(new), "seconds": round(seconds, 3)}
        print_json(result | cache_as_json(cache))
        return
    say(f"{len(new)} tokens, {len(new) / seconds:.1f} tokens/s")
    if cache is not None:
        say(cache_in_words(cache))


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """The prompt as the model wants it: {"input_ids": [1, T], "attention_mask": [1, T]}."""
    if chat:
        if not tokenizer.chat_template:
            raise RecipeError("--chat was given but the model has no chat template; leave --chat away.")
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise RecipeError("the prompt is empty; give the model something to continue.")
    return inputs


def _check_length(model: Any, prompt_tokens: int, max_new_tokens: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and prompt_tokens + max_new_tokens > positions:
        raise RecipeError(
            f"the prompt's {prompt_tokens} tokens and --max-new-tokens {max_new_tokens} do not fit the model's "
            f"{positions} positions; use --max-new-tokens {max(0, positions - prompt_tokens)} or a shorter prompt."
        )


def _pad_id(model: Any, tokenizer: Any) -> int:
    """Never visible with one prompt, but generate() wants one; many models name none."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, model.generation_config.pad_token_id)
    return next((token for token in known if token is not None), 0)
