"""What is written with a quantised cache against what is written with one in full precision."""

import json

import pytest
from tiny_models import save_tiny
from tiny_tokenizer import TEXT, VOCABULARY, save_tokenizer

from quantkit.errors import RecipeError
from quantkit.eval import kv_generation
from quantkit.kv.kivi import Keys
from quantkit.kv.quantiser import MinMax


def test_agreement_of_caches(tmp_path):
    save_tiny("llama", tmp_path / "tiny", vocab_size=VOCABULARY)
    save_tokenizer(tmp_path / "tiny")
    (tmp_path / "words.txt").write_text(f"{TEXT} " * 30)
    settings = {"root": tmp_path, "output": tmp_path / "out.json", "prompts": 3, "prompt_tokens": 12, "new_tokens": 6}
    kv_generation.main(["tiny=words.txt"], kv=["kv8", "rotation-1bit", "nsnquant-1bit"], **settings)
    good, bad, late = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (good["model"], good["text"], good["prompts"]) == ("tiny", "words", 3)
    assert (good["prompt_tokens"], good["new_tokens"]) == (12, 6)
    assert good["matched"] > bad["matched"]
    assert good["read_from_codes"] == bad["read_from_codes"] == 1
    assert (late["read_from_codes"], late["matched"], late["identical"]) == (0, 6, 3)  # nothing is encoded so soon


def test_share_of_what_new_tokens_see():
    """Groups of 8, of which the first new token sees one (of 12 tokens), the last one two (of 17)."""
    share = kv_generation.share_in_generation([Keys(2, 8, 0).store()], 12, 6)
    assert share == (4 * 8 + 2 * 16) / (12 + 13 + 14 + 15 + 16 + 17)
    assert kv_generation.share_in_generation([MinMax(8).store()], 12, 6) == 1
    with pytest.raises(RecipeError, match="nothing is generated"):
        kv_generation.share_in_generation([], 12, 6)
