"""AffineQuant (Ma et al., arXiv 2403.12544): ``omniquant`` with matrices where it has factors.

    y = W @ x   becomes   y = (W @ B) @ (B**-1 @ x)        B = diag(1 / t) @ (I + N): ``learn/affine.py``

Values are mixed within their heads, by a matrix for each key/value head that is folded into what makes them and what
reads them: nothing is left to do at inference. The output of a norm can be scaled and shifted for nothing, but not
mixed; ``norm_transform: dense_online`` mixes it in front of the linears that read it, by a matrix [hidden, hidden] that
is stored with each of them. That is the authors' recipe without rounded inputs, and dear: in 16 bits it adds 6.6 bits
to every weight of a 7B Llama, all of which ``quantkit inspect`` counts. Differences from the authors' code, besides
omniquant's:

  - Matrices stay invertible by construction (``parameterisation: dominant``). The authors push every entry away from
    0, which ends the dominance their argument rests on; that is left out of ``masked``, too.
  - Matrices are open behind half of the epochs, not in the last one only, and have a learning rate of their own.
  - One matrix for all query heads that read a key/value head. Queries and keys take none: with rotary embeddings it
    would not leave their products as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from quantkit.learn.affine import AffineChanges
from quantkit.models.block import Site
from quantkit.transforms import omniquant
from quantkit.transforms.interface import Online, Situation, Solution

_FAITHFUL = {
    "epochs": 20, "batch": 1, "schedule": "constant", "holdout": 0.0, "skip_first": False, "let": "always",
    "clip_start": "wide", "lr_let": 5e-3, "lr_clip": 1e-2, "lr_matrix": 5e-3, "parameterisation": "masked",
    "opening": 1.0,
}  # fmt: skip
_MIXED = ("attention.input", "mlp.input")
"""Sites that ``dense_online`` mixes."""


class Config(omniquant.Config):
    """Options of ``affinequant``."""

    preset: Literal["recommended", "faithful"] = Field(
        "recommended", description="faithful: the authors' recipe, for every option that is not given"
    )
    value_transform: Literal["matrix", "diag"] = Field(
        "matrix", description="values: a matrix per key/value head, free of cost, or scales and shifts alone"
    )
    norm_transform: Literal["diag", "dense_online"] = Field(
        "diag",
        description="inputs of attention and mlp: scales and shifts alone, or a matrix [hidden, hidden] at run time; "
        "the authors' choice without rounded inputs",
    )
    parameterisation: Literal["dominant", "masked"] = Field(
        "dominant", description="of matrices: diagonally dominant by construction, or the authors'"
    )
    stability: float | None = Field(
        None,
        ge=0,
        le=1,
        description="what learned entries off the diagonal are multiplied by; 0: no matrices; left out: 1, and for "
        "masked the authors' 0.1 where inputs are rounded, 0.01 where they are not",
    )
    opening: float = Field(0.5, ge=0, le=1, description="share of the epochs behind which matrices are learned whole")
    lr_matrix: float = Field(1e-2, gt=0, description="learning rate of entries off the diagonal")

    @model_validator(mode="before")
    @classmethod
    def _preset_first(cls, data: Any) -> Any:
        faithful = isinstance(data, Mapping) and data.get("preset") == "faithful"
        return {**_FAITHFUL, **data} if faithful else data

    def stability_of(self, rounds_inputs: bool) -> float:
        if self.stability is not None:
            return self.stability
        if self.parameterisation == "dominant":
            return 1.0
        return 0.1 if rounds_inputs else 0.01

    def mixes_values(self, site: Site, linears: Collection[str]) -> bool:
        """Of a v -> o site, only where both are quantised: the rounding of a weight that is stored as it stands could
        not be made up for."""
        return (
            self.value_transform == "matrix" and bool(site.head_dim) and {site.producer, *site.consumers} <= {*linears}
        )

    def mixes_inputs(self, site: Site) -> bool:
        return self.norm_transform == "dense_online" and self.stability != 0 and site.name in _MIXED


def online(sites: Iterable[Site], linears: Collection[str], config: Config) -> Online:
    sites = list(sites)
    found = omniquant.online(sites, linears, config)
    mixed = [name for site in sites if config.mixes_inputs(site) for name in site.consumers if name in linears]
    return found | {name: found.get(name, frozenset()) | {"dense"} for name in mixed}


def solve(situation: Situation, config: Config) -> Solution:
    """Changes and matrices of the signals of a block and limits of its linears, or nothing if round to nearest is no
    worse."""
    return omniquant.learn("affinequant", situation, config, lambda *seen: AffineChanges(situation, config, *seen))
