"""Recipes: what a scheme name means, and that a bad recipe is one line with every problem and its place."""

import json

import pytest

from quantkit.errors import RecipeError
from quantkit.presets import expand, method_steps
from quantkit.recipe import PER_CHANNEL, ActivationScheme, Recipe, Scheme, WeightScheme, build_recipe, load_recipe


@pytest.mark.parametrize(
    ("text", "bits", "group", "symmetric", "activations"),
    [
        ("W4A16G64", 4, 64, True, None),
        ("W4A16", 4, 128, True, None),
        ("W3A16", 3, 64, False, None),
        ("W2A16G32", 2, 32, False, None),
        ("W8A8", 8, PER_CHANNEL, True, 8),
        ("w4a4", 4, PER_CHANNEL, True, 4),
        ("W4ZA16G128", 4, 128, False, None),
        ("W3SA16", 3, 64, True, None),
        ("W8A16", 8, PER_CHANNEL, True, None),
        ("W4A16GC", 4, PER_CHANNEL, True, None),
    ],
)
def test_scheme_names(text, bits, group, symmetric, activations):
    scheme = Scheme.parse(text)
    assert scheme.weights is not None
    assert (scheme.weights.bits, scheme.weights.group_size) == (bits, group)
    assert scheme.weights.is_symmetric is symmetric
    assert (scheme.activations.bits if scheme.activations else None) == activations
    assert Scheme.parse(scheme.name) == scheme


def test_nf4_and_kv_parts():
    scheme = Scheme.parse("WNF4A16G64")
    assert scheme.weights == WeightScheme(bits=4, group_size=64, levels="nf4")
    assert Scheme.parse("W4A4KV4").kv is not None
    assert Scheme.parse("W4A4KV4").name == "W4A4KV4GC"


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("W8A8", {}),
        ("W6A6T", {"bits": 6, "granularity": "tensor"}),
        ("W8A8TS", {"granularity": "tensor", "dynamic": False}),
        ("W4A4Z", {"bits": 4, "symmetric": False}),
        ("w6a6zts", {"bits": 6, "symmetric": False, "granularity": "tensor", "dynamic": False}),
        ("W4ZA4ZTKV4G64", {"bits": 4, "symmetric": False, "granularity": "tensor"}),
        ("W4A4B32G128", {"bits": 4, "granularity": "group", "group_size": 32}),
        ("W4A4ZB8KV2", {"bits": 4, "symmetric": False, "granularity": "group", "group_size": 8}),
    ],
)
def test_activation_parts(text, settings):
    scheme = Scheme.parse(text)
    assert scheme.activations == ActivationScheme(**settings)
    assert Scheme.parse(scheme.name) == scheme


@pytest.mark.parametrize(
    ("activations", "problem"),
    [
        ({"granularity": "group"}, "group_size is missing; granularity: group needs a multiple of 8"),
        ({"granularity": "group", "group_size": 12}, "group_size is 12; granularity: group needs a multiple of 8"),
        ({"group_size": 32}, "group_size 32 has no meaning with granularity: token; leave it out"),
        ({"dynamic": False}, "granularity token is always dynamic; for dynamic: false use tensor"),
        ({"granularity": "group", "group_size": 32, "dynamic": False}, "granularity group is always dynamic"),
        ({"granularity": "tensor", "quantile": 0.99}, "quantile 0.99 has no meaning with dynamic scales"),
        ({"granularity": "tensor", "dynamic": False, "quantile": 0.5}, "quantile is 0.5; input should be greater than"),
    ],
)
def test_activations_that_contradict_themselves(activations, problem):
    with pytest.raises(RecipeError) as error:
        build_recipe({"scheme": {"activations": activations}, "steps": ["rtn"]}, "r.yaml")
    assert str(error.value).startswith("r.yaml: scheme.activations")
    assert problem in str(error.value)


def test_static_activations_round_trip_through_a_file(tmp_path):
    activations = {"granularity": "tensor", "dynamic": False, "quantile": 0.995}
    recipe = build_recipe({"scheme": {"weights": {"bits": 8}, "activations": activations}, "steps": ["rtn"]})
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "r.yaml") == recipe
    assert recipe.scheme.name == "W8A8TSG128"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "W4B16",
        "W8A16T",
        "W8A16Z",
        "W8AT",
        "W8A8S",
        "W8A8TSZ",
        "W8A8B",
        "W8A8B12",
        "4bit",
        "W9A16",
        "W1A16",
        "W4A16G48x",
        "W4A16G4",
        "WNF4ZA16G64",
    ],
)
def test_unreadable_schemes_are_named(text):
    with pytest.raises(RecipeError, match="scheme"):
        Scheme.parse(text)


def test_yaml_and_json_round_trip(tmp_path):
    recipe = expand(method="sinq", scheme="W3A16G64", ignore=("lm_head", "*.down_proj"), seed=7)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    (tmp_path / "r.json").write_text(json.dumps(recipe.model_dump(mode="json")))
    assert load_recipe(tmp_path / "r.yaml") == recipe
    assert load_recipe(tmp_path / "r.json") == recipe


def test_short_forms_in_a_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("scheme: W4A16G64\nsteps: [sinq, rtn]\n")
    assert load_recipe(path) == expand(method="sinq", scheme="W4A16G64")


def test_every_problem_is_listed_with_its_place():
    with pytest.raises(RecipeError) as error:
        build_recipe({"scheme": {"weights": {"bits": 4, "groupsize": 64}}, "steps": ["rtn"], "sed": 1}, "r.yaml")
    text = str(error.value)
    assert text.startswith("r.yaml: ")
    assert "\n" not in text
    assert "scheme.weights.groupsize is not a key here. Did you mean 'group_size'?" in text
    assert "sed is not a key here. Did you mean 'seed'?" in text


@pytest.mark.parametrize("group", [48.5, 0, 7, 12, -2])
def test_group_sizes_that_do_not_pack_are_refused(group):
    with pytest.raises(RecipeError, match="group_size"):
        build_recipe({"scheme": {"weights": {"group_size": group}}, "steps": ["rtn"]})


def test_files_that_are_no_recipe(tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "broken.json").write_text("{")
    for name in ("list.yaml", "broken.yaml", "broken.json", "missing.yaml"):
        with pytest.raises(RecipeError, match=name):
            load_recipe(tmp_path / name)


def test_flags_override_a_recipe_and_none_does_not():
    base = expand(method="rtn", scheme="W8A16", seed=3)
    changed = expand(base, scheme="W4A16G32", method="sinq", seed=None, dtype="float32")
    assert [step.method for step in changed.steps] == ["sinq", "rtn"]
    assert changed.scheme == Scheme.parse("W4A16G32")
    assert (changed.seed, changed.dtype) == (3, "float32")
    assert isinstance(changed, Recipe)


def test_method_presets():
    assert method_steps("sinq") == [{"method": "sinq"}, {"method": "rtn"}]
    assert method_steps("rtn") == [{"method": "rtn"}]
    with pytest.raises(RecipeError, match=r"unknown method 'snq'\. Did you mean 'sinq'"):
        method_steps("snq")


def test_calibration_flags_change_single_settings_of_a_recipe():
    base = expand(method="gptq", scheme="W4A16G64", calibration={"source": "c4", "nsamples": 16})
    changed = expand(base, calibration={"seqlen": 256})
    assert (changed.calibration.source, changed.calibration.nsamples, changed.calibration.seqlen) == ("c4", 16, 256)
    with pytest.raises(RecipeError, match=r"calibration\.nsample is not a key here\. Did you mean 'nsamples'"):
        expand(method="gptq", calibration={"nsample": 3})
