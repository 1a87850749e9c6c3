"""Registration with transformers happens in fresh processes here, because it happens once per process."""

import subprocess
import sys

import pytest

REGISTERED = (
    "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING;"
    "assert AUTO_QUANTIZER_MAPPING['quantkit'].__name__ == 'QuantkitHfQuantizer';"
    "assert AUTO_QUANTIZATION_CONFIG_MAPPING['quantkit'].__name__ == 'QuantkitConfig';"
)


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_quantkit_is_light():
    run(
        "import sys, quantkit;"
        "heavy = {'torch', 'transformers', 'pydantic', 'yaml', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "assert quantkit.RecipeError"
    )


@pytest.mark.parametrize(
    "order",
    [
        "import quantkit; from quantkit.integrations.hook import register_with_transformers as again; again();",
        "import transformers.quantizers.auto; import quantkit; quantkit.register_with_transformers();",
        "import quantkit.integrations.transformers;",
    ],
    ids=["quantkit first", "transformers first", "the integration itself first"],
)
def test_registers_in_any_order(order):
    """Once, also when asked twice, and without a trace in how modules are found and inspected."""
    run(
        order + REGISTERED + "import sys, inspect, transformers.quantizers.auto as table;"
        "assert not any('quantkit' in type(finder).__module__ for finder in sys.meta_path);"
        "assert 'def register_quantizer' in inspect.getsource(table)"
    )


def test_unknown_names_are_attribute_errors():
    import quantkit

    assert not hasattr(quantkit, "qantize")
    with pytest.raises(ImportError):
        from quantkit import qantize  # noqa: F401
