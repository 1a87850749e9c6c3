import re

from handmade import layer_format

from quantkit.formats.matching import LayerFormats, compact

FOUR, EIGHT, THREE = layer_format("W4A16"), layer_format("W8A16"), layer_format("W3A16")


def matched(patterns: list[str], name: str) -> bool:
    formats = LayerFormats(
        exact={pattern: FOUR for pattern in patterns if not pattern.startswith("re:")},
        expressions=tuple((re.compile(pattern[3:]), FOUR) for pattern in patterns if pattern.startswith("re:")),
    )
    return formats.of(name) is not None


def test_one_expression_for_all_blocks_and_experts():
    names = [f"model.layers.{block}.mlp.experts.{expert}.w1" for block in range(40) for expert in range(64)]
    patterns = compact(names, ["lm_head", "model.layers.0.mlp.experts.0.w2"])
    assert patterns == [r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.w1$"]
    assert all(matched(patterns, name) for name in names)


def test_expressions_match_nothing_else():
    patterns = compact(["m.layers.0.mlp.gate", "m.layers.1.mlp.gate"], [])
    for name in ("m.layers.0.mlp.gate_proj", "xm.layers.0.mlp.gate", "mxlayers.0.mlp.gate", "m.layers.a.mlp.gate"):
        assert not matched(patterns, name)


def test_exact_names_where_a_family_is_split():
    names = [f"layers.{block}.up" for block in (0, 2, 3)] + [f"layers.{block}.down" for block in range(4)]
    patterns = compact(names, ["layers.1.up"])
    assert patterns == ["layers.0.up", "layers.2.up", "layers.3.up", r"re:layers\.\d+\.down$"]
    assert not matched(patterns, "layers.1.up")


def test_a_single_layer_is_named_exactly():
    assert compact(["layers.0.up"], []) == ["layers.0.up"]


def test_what_wins():
    formats = LayerFormats(
        exact={"a.0.up": EIGHT},
        expressions=((re.compile(r"a\.\d+\.(up|down)"), THREE), (re.compile(".*"), EIGHT)),
        every_linear=FOUR,
        ignored=frozenset({"lm_head"}),
        ignored_expressions=(re.compile(r".*\.gate"),),
    )
    assert formats.of("a.0.up") == EIGHT  # exact before expression
    assert formats.of("a.1.up") == THREE  # first expression
    assert formats.of("lm_head") is None
    assert formats.of("a.1.gate") is None
    assert LayerFormats(every_linear=FOUR).of("anything") == FOUR
    assert LayerFormats().of("anything") is None
