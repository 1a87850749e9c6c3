"""Norms and gates of a loaded model that make the codes of the linears behind them in the same launch.

    norm -> q, k, v; norm -> gate, up    one kernel writes the norm and its codes, for who reads that very tensor
    act(gate) * up -> down               one kernel writes the codes, and nothing else

No module is replaced: a norm or an MLP becomes one of a subclass of its class with another ``forward``, which calls
that of the class where kernels do not run (CPUs, other dtypes, gradients, autocast, compilers, hooks in between). Which
norm or MLP it is, its instructions say: ``forward`` of its class must be, one for one, one of those below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

from quantkit.kernels import dispatch
from quantkit.kernels.triton import activation, fused, integer
from quantkit.kernels.triton.fused import Activation, Norm, NormKind
from quantkit.layers.quant_linear import QuantLinear
from quantkit.layers.sharing import SharedInput
from quantkit.models.architectures import ARCHITECTURES


def _llama_norm(self: Any, hidden_states: Any) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


def _gemma_normalise(self: Any, x: Any) -> Any:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def _gemma_norm(self: Any, x: Any) -> Any:
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)


def _llama_mlp(self: Any, x: Any) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _phi3_mlp(self: Any, hidden_states: Any) -> Any:
    up_states = self.gate_up_proj(hidden_states)
    gate, up_states = up_states.chunk(2, dim=-1)
    up_states = up_states * self.activation_fn(gate)
    return self.down_proj(up_states)


def fuse_inputs(model: nn.Module) -> None:
    """Let norms and MLPs of ``model`` make the codes of the quantised linears behind them, where kernels can.

    A norm of a model of unknown architecture stays as it is: nothing says there which linears read it. To be called
    behind ``sharing.share_inputs``.
    """
    for module in model.modules():
        if _is_fusable_mlp(module):
            _become(FusedMLP, module)
    architecture = ARCHITECTURES.get(type(model).__name__)
    if architecture is None:
        return
    for block in model.get_submodule(architecture.blocks).children():
        parts = dict(block.named_modules())
        for group in architecture.norm_groups:
            norm = parts.get(group.norm or "")
            readers = [parts[path] for path in group.consumers if path in parts]
            if norm is not None and norm is not block:
                _fuse_norm(norm, readers)


def _fuse_norm(norm: nn.Module, readers: list[nn.Module]) -> None:
    """Let ``norm`` make the codes of those of ``readers`` that do the same to it; of several such, of the most."""
    able = [reader for reader in readers if isinstance(reader, QuantLinear) and _reads_codes(reader)]
    kind = norm_kind(norm)
    if not able or kind is None or "forward" in vars(norm) or able[0].in_features > activation.WHOLE_COLUMNS:
        return
    reader = max(able, key=lambda one: 1 if one.shared_input is None else one.shared_input.readers)
    if reader.shared_input is None:
        reader.shared_input = SharedInput(1)
    norm.codes = _Codes(kind, reader)  # type: ignore[assignment]  # no tensor and no module: it is not registered
    _become(FusedNorm, norm)


@dataclass(eq=False)
class _Codes:
    """What codes a norm makes."""

    kind: NormKind
    reader: QuantLinear
    """One of the linears that they are for; the others share its input."""
    useful: bool = True
    """False: what reads the norm sees another tensor, a view of it or what a hook made of it."""


class _Subclass(nn.Module):
    """Comes before the class that a module had; ``_become`` makes the class that has both."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For ``pickle``, which finds no class by a name that another one has."""
        made: Any = super().__reduce_ex__(protocol)
        _, _, *state = made
        return _new, type(self).__bases__, *state


def _become(kind: Any, module: nn.Module) -> None:
    base: Any = type(module)
    module.__class__ = _class_of(kind, base)


@functools.cache
def _class_of(kind: Any, base: Any) -> Any:
    return type(base.__name__, (kind, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})


def _new(kind: Any, base: Any) -> nn.Module:
    made: nn.Module = object.__new__(_class_of(kind, base))
    return made


class FusedNorm(_Subclass):
    """A norm that hands codes on beside what it returns."""

    codes: _Codes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        codes = self.codes
        shared, scheme = codes.reader.shared_input, codes.reader.format.activations
        fuses = codes.useful and shared is not None and not self._forward_hooks
        if not isinstance(x, Tensor) or not fuses or not _runs(x, codes.reader, tuple(self.parameters())):
            return super().forward(*args, **kwargs)
        assert shared is not None
        assert scheme is not None
        made = fused.norm_quantize(x, _norm(self, codes.kind), codes.reader.inputs, scheme, values=True)
        assert made.values is not None
        codes.useful = shared.offer(made.values, made.codes, "codes")
        return made.values


class FusedMLP(_Subclass):
    """An MLP whose last linear reads act(gate) * up as codes."""

    gate_up_proj: nn.Module
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or not fused.runs_on(x) or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        if hasattr(self, "gate_up_proj"):
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return gated_linear(gate, up, _activation_function(self), self.down_proj)


def gated_linear(gate: Tensor, up: Tensor, function: Callable[[Tensor], Tensor], down: nn.Module) -> Tensor:
    """``down(function(gate) * up)`` for two tensors [..., columns] -> [..., out_features]; ``down`` of any kind."""
    if isinstance(down, QuantLinear) and _is_untouched(down) and _is_untouched(function) and _runs(up, down, (gate,)):
        name, scheme, inputs, runtime = activation_name(function), down.format.activations, down.inputs, down.runtime
        assert scheme is not None
        assert runtime is not None
        if name is not None and fused.unsuited(scheme, inputs) is None:
            codes = fused.gated_quantize(gate, up, name, inputs, scheme)
            y = integer.multiply(codes, runtime.packed, down.bias, up.dtype)
            return y.view(*up.shape[:-1], down.out_features)
    result: Tensor = down(function(gate) * up)
    return result


def norm_kind(norm: nn.Module) -> NormKind | None:
    """Which norm of ``fused.py`` this is; None: none of them."""
    if type(norm) is nn.LayerNorm:
        return "layer" if norm.elementwise_affine and len(norm.normalized_shape) == 1 else None
    if _is_same(type(norm).forward, _llama_norm):
        return "llama"
    if _is_same(type(norm).forward, _gemma_norm) and _is_same(getattr(type(norm), "_norm", None), _gemma_normalise):
        return "gemma"
    return None


def activation_name(function: Callable[[Tensor], Tensor]) -> Activation | None:
    """Which function of ``fused.py`` this is; None: none of them."""
    from transformers.activations import GELUTanh, SiLUActivation

    if function is F.silu or type(function) in (nn.SiLU, SiLUActivation):
        return "silu"
    if isinstance(function, nn.GELU):
        return "gelu" if function.approximate == "tanh" else None
    inner = function.act if isinstance(function, GELUTanh) else function
    if isinstance(inner, functools.partial) and inner.func is F.gelu and inner.keywords == {"approximate": "tanh"}:
        return "gelu"
    return None


def _norm(norm: Any, kind: NormKind) -> Norm:
    eps = norm.variance_epsilon if kind == "llama" else norm.eps
    return Norm(kind, norm.weight, norm.bias if kind == "layer" else None, eps)


def _is_fusable_mlp(module: nn.Module) -> bool:
    if "forward" in vars(module) or not _has_known_mlp(module):
        return False
    down = module.down_proj
    codes = isinstance(down, QuantLinear) and _reads_codes(down)
    return codes and activation_name(_activation_function(module)) is not None


def _has_known_mlp(module: nn.Module) -> bool:
    return any(_is_same(type(module).forward, known) for known in (_llama_mlp, _phi3_mlp))


def _activation_function(mlp: Any) -> Callable[[Tensor], Tensor]:
    """That of an MLP with the forward of Llama's or of Phi-3's."""
    found: Callable[[Tensor], Tensor] = mlp.activation_fn if hasattr(mlp, "gate_up_proj") else mlp.act_fn
    return found


def _reads_codes(layer: QuantLinear) -> bool:
    """Can the kernels of ``fused.py`` make what the layer reads, where its product is one of integers?"""
    scheme = layer.format.activations
    return scheme is not None and fused.unsuited(scheme, layer.inputs) is None


def _runs(x: Tensor, reader: QuantLinear, others: tuple[Tensor, ...]) -> bool:
    """Would ``reader`` turn an input like ``x`` into codes on a GPU right now, and may a kernel read ``others``?"""
    if torch.compiler.is_compiling() or not fused.runs_on(x) or x.numel() == 0:
        return False
    if any(other.dtype != x.dtype or other.device != x.device for other in (reader.weight_scale, *others)):
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others)):
        return False
    return dispatch.choose(x, reader).run is integer.run


def _is_untouched(module: object) -> bool:
    """Nobody looks at what goes into ``module`` or comes out of it; so it is with a plain function."""
    return not isinstance(module, nn.Module) or not (
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
    )


def _is_same(function: Any, known: Callable[..., Any]) -> bool:
    """Do both do the same, instruction for instruction?"""
    code: CodeType | None = getattr(function, "__code__", None)
    own = known.__code__
    return code is not None and (code.co_code, code.co_names, code.co_consts) == (
        own.co_code, own.co_names, own.co_consts,
    )  # fmt: skip
