"""Checks an installed copy of quantkit in the folder FOLDER: every part is there, and the demo model comes with it.

Usage: python -I check_package.py FOLDER    (-I: nothing of the checkout is on the path)
"""

import importlib
import sys
from pathlib import Path

folder = Path(sys.argv[1]).resolve()
sys.path.insert(0, str(folder))

missing = []
for path in sorted((folder / "quantkit").rglob("*.py")):
    if path.name == "__main__.py":
        continue
    name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    if folder not in Path(str(module.__file__)).parents:
        missing.append(f"{name} was imported from {module.__file__}")
parts = ["kernels/reference.py", "cli/main.py", "eval/perplexity.py", "demo/heldout.txt", "demo/calibration.txt"]
parts += ["kv/nsn_codebooks_v1.safetensors", "eval/report/template.html.jinja"]
parts += [f"eval/report/{name}" for name in ("style.css", "sort.js")]
parts += [f"demo/model/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json")]
for part in parts:
    if not (folder / "quantkit" / part).is_file():
        missing.append(f"quantkit/{part} is not in the wheel")
if missing:
    sys.exit("\n".join(missing))
print("the wheel holds every part")
