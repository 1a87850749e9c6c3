"""Compiles a Triton kernel for a GPU that is not there, and reads from the result what decides about its speed.

Registers, spilled bytes, shared memory and the instructions of the main loop: from ptxas's output through the
cuobjdump that comes with Triton, and from the listing that LLVM writes for AMD. Nothing is run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from quantkit.kernels.triton import compat, configs

TARGETS = ("sm_80", "sm_90", "gfx942")


class Built(NamedTuple):
    """What a kernel became on one target."""

    registers: int
    """Per thread; AMD: vector registers."""
    spilled: int
    """NVIDIA: bytes of stack of a thread; AMD: registers that did not fit."""
    shared: int
    """Bytes."""
    instructions: Counter[str]
    """Of the whole kernel, without operands."""
    loop: Counter[str]
    """Of the loop with the most matrix instructions."""

    def count(self, pattern: str) -> int:
        """Instructions of the kernel that start with the regular expression ``pattern``."""
        return sum(number for name, number in self.instructions.items() if re.match(pattern, name))


def build(
    kernel: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    target: str,
    warps: int,
    stages: int,
    divisible: tuple[str, ...] = (),
    fusion: bool = True,
) -> Built:
    """Compile ``kernel``.

    Args:
        arguments: name -> Triton's name of its type (``*fp16``, ``i32``) of what a launch passes.
        constants: every other argument's value; None for a tensor that is not there.
        target: one of ``TARGETS``.
        divisible: integers that are multiples of 16 in this variant; addresses always are.
        fusion: products and sums may become one instruction, with one rounding.

    Raises:
        triton.CompilationError, RuntimeError: the kernel or what Triton made of it does not compile.
    """
    gpu_target = compat.module("backends.compiler").GPUTarget
    names = kernel.arg_names
    signature = {name: arguments.get(name, "constexpr") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in divisible]
    source = compat.module("compiler").ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    nvidia = target.startswith("sm_")
    where = gpu_target("cuda", int(target[3:]), 32) if nvidia else gpu_target("hip", target, 64)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion}
    compiled = compat.module().compile(source, target=where, options=options)
    if nvidia:
        return _nvidia(compiled.asm["cubin"], compiled.metadata.shared)
    return _amd(compiled.asm["amdgcn"], compiled.metadata.shared)


class Line(NamedTuple):
    """A line of a report."""

    target: str
    variant: str
    built: Built
    more: dict[str, str]
    """Column of this report -> what to write in it."""
    meant: bool = True
    """Are the instructions that are meant there?"""

    @property
    def fits(self) -> bool:
        return self.meant and not self.built.spilled and self.built.shared <= configs.SHARED_LIMIT[self.target]


def print_lines(lines: Iterable[Line]) -> int:
    """Print a table, line by line; 1 if one does not fit its target, spills or lacks what is meant."""
    unfit, headed = 0, False
    for line in lines:
        built = line.built
        columns = line.more | {
            "regs": str(built.registers), "spilled": str(built.spilled), "shared": str(built.shared),
        }  # fmt: skip
        if not headed:
            print(f"{'target':8}{'variant':60}" + "".join(f"{name:>{len(name) + 5}}" for name in columns))
            headed = True
        cells = "".join(f"{value:>{len(name) + 5}}" for name, value in columns.items())
        print(f"{line.target:8}{line.variant:60}{cells}{'' if line.fits else '  DOES NOT FIT'}", flush=True)
        unfit += not line.fits
    return int(unfit > 0)


def _nvidia(cubin: bytes, shared: int) -> Built:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = compat.module("knobs").nvidia.cuobjdump.path
        usage, listing = (
            subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;\n]*);", listing, re.MULTILINE)
    code = [(int(address, 16), name, operands) for address, name, operands in lines if name != "NOP"]
    jumps = [
        (int(found[1], 16), address)
        for address, name, operands in code
        if name == "BRA" and (found := re.search(r"0x([0-9a-f]+)", operands)) and int(found[1], 16) < address
    ]
    bodies = [Counter(name for address, name, _ in code if first <= address <= last) for first, last in jumps]
    whole = Counter(name for _, name, _ in code)
    return Built(used["REG"], used["STACK"] + used["LOCAL"], shared, whole, _busiest(bodies, "[A-Z]*MMA"))


def _amd(listing: str, shared: int) -> Built:
    used = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", listing)}
    code: list[str] = []
    labels: dict[str, int] = {}
    bodies = []
    for line in listing.splitlines():
        if found := re.match(r"(\.\w+):", line):
            labels[found[1]] = len(code)
        elif found := re.match(r"\t([a-z]\w+)(?:\s+(\S+))?", line):
            code.append(found[1])
            if found[1].startswith(("s_cbranch", "s_branch")) and (start := labels.get(str(found[2]))) is not None:
                bodies.append(Counter(code[start:]))
    spilled = used["vgpr_spill_count"] + used["sgpr_spill_count"]
    return Built(used["vgpr_count"], spilled, shared, Counter(code), _busiest(bodies, "v_mfma"))


def _busiest(bodies: list[Counter[str]], pattern: str) -> Counter[str]:
    def products(body: Counter[str]) -> int:
        return sum(number for name, number in body.items() if re.match(pattern, name))

    # Of loops around one another the inner: the shortest of those with as many matrix instructions.
    return max(bodies, key=lambda body: (products(body), -body.total()), default=Counter())
