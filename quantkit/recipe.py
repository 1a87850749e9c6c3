"""The run as one validated object: what every stage may trust, what is saved beside the weights.

A recipe is read from YAML or JSON, or expanded from the presets ``--method`` and ``--scheme``; flags override it.
Stages never see an unchecked value: shapes are checked against the model in ``plan.py``, everything else here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quantkit.errors import RecipeError, did_you_mean

PER_CHANNEL = -1
"""``group_size`` that means one scale per output row."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WeightScheme(_Strict):
    """How one weight matrix [out_features, in_features] is stored."""

    bits: int = Field(4, ge=2, le=8, description="width of a stored code")
    symmetric: bool | None = Field(
        None, description="no zero point; unset: symmetric for 4 and 8 bits (portable), asymmetric otherwise"
    )
    group_size: int = Field(128, description="input columns that share one scale; -1: one scale per output row")
    levels: Literal["uniform", "nf4"] = Field("uniform", description="evenly spaced codes, or the 4-bit normal float")

    @field_validator("group_size")
    @classmethod
    def _group_size_is_usable(cls, group_size: int) -> int:
        if group_size != PER_CHANNEL and (group_size < 8 or group_size % 8):
            raise ValueError(f"is {group_size}; use -1 (per channel) or a multiple of 8")
        return group_size

    @model_validator(mode="after")
    def _levels_fit_bits(self) -> WeightScheme:
        if self.levels == "nf4" and (self.bits != 4 or self.symmetric is False):
            raise ValueError("levels: nf4 is a symmetric 4-bit format; use bits: 4 and leave symmetric unset")
        return self

    @property
    def is_symmetric(self) -> bool:
        """The choice in force: the one made, else symmetric where a portable checkpoint can hold the result."""
        if self.symmetric is not None:
            return self.symmetric
        return self.levels == "nf4" or self.bits in (4, 8)


class ActivationScheme(_Strict):
    """How the input of a linear is quantised at run time."""

    bits: int = Field(8, ge=2, le=8, description="width of a code")
    symmetric: bool = Field(True, description="no zero point")
    granularity: Literal["token", "tensor", "group"] = Field(
        "token", description="what shares one scale; group: neighbouring channels of one token"
    )
    group_size: int | None = Field(None, description="channels of a group; needed with granularity: group only")
    dynamic: bool = Field(True, description="scales from the data at hand, not from calibration")
    quantile: float = Field(
        1.0, gt=0.5, le=1, description="static only: share of the tokens whose largest values the range still holds"
    )

    @model_validator(mode="after")
    def _granularity_is_complete(self) -> ActivationScheme:
        size = self.group_size
        if self.granularity != "group" and size is not None:
            raise ValueError(f"group_size {size} has no meaning with granularity: {self.granularity}; leave it out")
        if self.granularity == "group" and (size is None or size < 8 or size % 8):
            given = "is missing" if size is None else f"is {size}"
            raise ValueError(f"group_size {given}; granularity: group needs a multiple of 8")
        return self

    @model_validator(mode="after")
    def _static_is_per_tensor(self) -> ActivationScheme:
        if not self.dynamic and self.granularity != "tensor":
            raise ValueError(f"granularity {self.granularity} is always dynamic; for dynamic: false use tensor")
        if self.dynamic and self.quantile < 1:
            raise ValueError(f"quantile {self.quantile} has no meaning with dynamic scales; it needs dynamic: false")
        return self

    @property
    def name(self) -> str:
        """The part behind ``A`` of a scheme's short form, as ``Scheme.parse`` reads it."""
        shared = {"token": "", "tensor": "T" if self.dynamic else "TS", "group": f"B{self.group_size}"}
        return f"{self.bits}{'' if self.symmetric else 'Z'}{shared[self.granularity]}"


class KVScheme(_Strict):
    """How keys and values are held in the cache."""

    bits: int = Field(4, ge=2, le=8, description="width of a code")
    symmetric: bool = Field(False, description="no zero point")
    clip: float = Field(1.0, gt=0, le=1, description="share of the range of a token and head that its grid covers")
    key_transform: Literal["none", "hadamard"] | None = Field(
        None, description="rotation of the keys before they are rounded; unset: hadamard up to 4 bits, none above"
    )

    @property
    def transform(self) -> Literal["none", "hadamard"]:
        """The choice in force. On keys with outlier channels or heavy tails the rotation takes a third to almost a half
        off the error at any width above 2 bits, and on Gaussian ones nothing; from 5 bits on what is left to gain is
        not worth turning every key back at every step."""
        if self.key_transform is not None:
            return self.key_transform
        return "hadamard" if self.bits <= 4 else "none"


_SCHEME = re.compile(
    r"^(?:W(?P<w>\d+|NF4)(?P<sz>[SZ])?)?(?:A(?P<a>\d+)(?P<az>Z)?(?P<how>TS?|B\d+)?)?"
    r"(?:KV(?P<kv>\d+))?(?:G(?P<g>\d+|C))?$",
    re.IGNORECASE,
)


class Scheme(_Strict):
    """Weight, activation and KV formats of a run; ``None`` leaves that part in full precision."""

    weights: WeightScheme | None = None
    activations: ActivationScheme | None = None
    kv: KVScheme | None = None

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """``W4A16G64``, ``W8A8``, ``W3ZA16G128``, ``WNF4G64``, ``W4A4KV4``, ``W4A16GC`` (per channel), ``W6A6ZTS``.

        ``S``/``Z`` behind the weight bits forces symmetric / zero point. Without ``G``: per channel when activations
        are quantised or at 8 bits, else groups of 128 at 4 bits and more, 64 below.

        Activations are symmetric; ``Z`` behind their bits gives them a zero point. They are dynamic and per token;
        ``T`` behind that: per tensor, ``TS``: per tensor and static, ``B32``: per token and block of 32 channels.

        Raises:
            RecipeError: the text is no scheme, or names a width that is not supported.
        """
        found = _SCHEME.match(text.strip())
        if not found or not text.strip():
            raise RecipeError(
                f"scheme '{text}' cannot be read: write W<bits>[S|Z]A<bits>[Z][T|TS|B<size>][KV<bits>][G<size>|GC], "
                "for example W4A16G64, W8A8, W3ZA16G128, WNF4A16G64, W4A4KV4, W8A8TS, W6A6ZT."
            )
        part = found.groupdict()
        activations = _parse_activations(text, part)
        weights: dict[str, Any] | None = None
        if part["w"] and part["w"] != "16":
            nf4 = part["w"].upper() == "NF4"
            bits = 4 if nf4 else int(part["w"])
            if part["g"]:
                group = PER_CHANNEL if part["g"].upper() == "C" else int(part["g"])
            elif activations is not None or (bits == 8 and not nf4):
                group = PER_CHANNEL
            else:
                group = 128 if bits >= 4 and not nf4 else 64
            weights = {"bits": bits, "group_size": group, "levels": "nf4" if nf4 else "uniform"}
            if part["sz"]:
                weights["symmetric"] = part["sz"].upper() == "S"
        try:
            return cls.model_validate(
                {
                    "weights": weights,
                    "activations": activations,
                    "kv": None if part["kv"] in (None, "16") else {"bits": int(part["kv"])},
                }
            )
        except ValidationError as error:
            raise RecipeError(f"scheme '{text}': " + "; ".join(_problems(error))) from None

    @property
    def name(self) -> str:
        """The short form, as ``parse`` reads it."""
        text = "W16"
        if self.weights:
            text = "WNF4" if self.weights.levels == "nf4" else f"W{self.weights.bits}"
            if self.weights.symmetric is not None:
                text += "S" if self.weights.symmetric else "Z"
        text += f"A{self.activations.name if self.activations else 16}"
        if self.kv:
            text += f"KV{self.kv.bits}"
        if self.weights:
            text += "GC" if self.weights.group_size == PER_CHANNEL else f"G{self.weights.group_size}"
        return text


def _parse_activations(text: str, part: dict[str, Any]) -> dict[str, Any] | None:
    """The activations among the parts of the scheme ``text``."""
    how = (part["how"] or "").upper()
    if part["a"] in (None, "16"):
        if how or part["az"]:
            raise RecipeError(f"scheme '{text}': A16 leaves activations as they are; write nothing behind it.")
        return None
    activations: dict[str, Any] = {"bits": int(part["a"]), "symmetric": not part["az"], "dynamic": how != "TS"}
    if how.startswith("B"):
        return activations | {"granularity": "group", "group_size": int(how[1:])}
    return activations | {"granularity": "tensor" if how else "token"}


class Calibration(_Strict):
    """The samples that methods with statistics look at."""

    source: str = Field(
        "demo",
        min_length=1,
        description="demo, wikitext2, c4, pile-val, ultrachat, a .txt/.jsonl/.parquet file or a folder of them, or "
        "generated: text the model writes itself",
    )
    nsamples: int = Field(64, ge=1, description="windows of text")
    seqlen: int = Field(512, ge=2, description="tokens per window; no more than the model has positions")
    batch_size: int = Field(8, ge=1, description="windows per forward pass: memory, not results")
    column: str | None = Field(
        None, description="field that holds the text, or a conversation; default: text, else messages"
    )
    scripts: tuple[str, ...] = Field(
        ("latin",), min_length=1, description="generated: writing systems in which a text may begin"
    )
    seed: int = Field(0, ge=0, description="of the choice of windows")
    max_memory: float | None = Field(
        None, gt=0, description="GiB that hidden states may take in memory; more of them are kept on disk"
    )

    @property
    def max_memory_bytes(self) -> int | None:
        return None if self.max_memory is None else int(self.max_memory * 2**30)

    def fitted(self, config: Any) -> tuple[Calibration, str | None]:
        """These settings for the model of ``config`` (its text part), and what was changed, in one sentence."""
        positions = getattr(config, "max_position_embeddings", None)
        if positions is None or self.seqlen <= positions:
            return self, None
        note = f"calibration windows have {positions} tokens instead of {self.seqlen}: the model has no more positions."
        return self.model_copy(update={"seqlen": positions}), note


class Step(_Strict):
    """One method of the run with its options; the method's own ``Config`` checks them when the run is planned."""

    method: str = Field(description="a name of `quantkit methods`")
    options: dict[str, Any] = Field(default_factory=dict, description="of the method")


class Recipe(_Strict):
    """Everything a run does."""

    scheme: Scheme = Field(description="how numbers are stored, a name such as W4A16G64 or its parts")
    steps: tuple[Step, ...] = Field(description="transforms in order, then one rounding, then tuning")
    calibration: Calibration = Field(Calibration(), description="used by methods that need data, else of no effect")
    ignore: tuple[str, ...] = Field(
        ("lm_head",), description="modules left in full precision: exact names, globs, or 're:...' patterns"
    )
    format: Literal["auto", "compressed-tensors", "quantkit"] = Field(
        "auto", description="checkpoint format; auto: compressed-tensors whenever it can hold the result"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype of scales and of everything left unquantised; auto: the source's"
    )
    seed: int = Field(0, ge=0, description="seed of everything random in the run")
    kv: dict[str, Any] | None = Field(
        None,
        description="how the checkpoint keeps keys and values, in the place of KV<bits> of the scheme: a name of "
        "`quantkit methods`, or its method and settings",
    )
    allow_nonfinite: bool = Field(
        False, description="keep a layer with NaN or Inf in full precision instead of failing"
    )

    @field_validator("scheme", mode="before")
    @classmethod
    def _scheme_may_be_a_name(cls, value: Any) -> Any:
        return Scheme.parse(value) if isinstance(value, str) else value

    @field_validator("steps", mode="before")
    @classmethod
    def _a_step_may_be_a_name(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return [{"method": step} if isinstance(step, str) else step for step in value]

    @field_validator("kv", mode="before")
    @classmethod
    def _kv_may_be_a_name(cls, value: Any) -> Any:
        """``kivi-2bit`` or {method: kivi, bits: 2} -> the method and all its settings, checked."""
        if isinstance(value, str):
            value = {"method": value}
        if not isinstance(value, dict):
            return value
        from quantkit.kv import methods

        settings = dict(value)
        method = settings.pop("method", None)
        if not isinstance(method, str):
            raise ValueError("names no method; write kv: kivi-2bit, or kv: {method: kivi, bits: 2}")
        if method == methods.NONE and not settings:
            return None
        try:
            row, config = methods.request(method, settings)
            row.check_no_file(config)
        except RecipeError as error:
            raise ValueError(f"is no cache: {error}".removesuffix(".")) from None
        return {"method": row.name, **config.model_dump(mode="json")}

    @model_validator(mode="after")
    def _one_says_how_keys_and_values_are_kept(self) -> Recipe:
        if self.kv is not None and self.scheme.kv is not None:
            raise ValueError(
                f"kv asks for {self.kv['method']} and the scheme for KV{self.scheme.kv.bits}; leave one of them out"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(path: Path) -> Recipe:
    """Read a YAML or JSON recipe.

    Raises:
        RecipeError: no such file, not YAML/JSON, or invalid; every problem is listed with its place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from None
    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        where = " ".join(str(error).split())
        raise RecipeError(
            f"recipe {path} is not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {where}"
        ) from None
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path} must be a mapping with 'scheme' and 'steps', got {type(data).__name__}.")
    return build_recipe(data, origin=str(path))


def build_recipe(data: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Validate ``data``; a ``RecipeError`` lists every problem as ``origin: key.path problem``."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{origin}: " + "; ".join(_problems(error))) from None


def _problems(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors(include_url=False):
        place = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"is not a key here. {did_you_mean(str(problem['loc'][-1]), _keys_at(problem['loc'][:-1]))}"
        elif problem["type"] not in ("missing", "value_error"):
            message = f"is {problem['input']!r}; {message[0].lower()}{message[1:]}"
        lines.append(f"{place} {message}".strip())
    return lines


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the model that sits at ``loc`` in a recipe (or in a scheme)."""
    by_name: dict[str, type[BaseModel]] = {
        "scheme": Scheme, "weights": WeightScheme, "activations": ActivationScheme, "kv": KVScheme, "steps": Step,
        "calibration": Calibration,
    }  # fmt: skip
    named = [part for part in loc if isinstance(part, str)]
    return list((by_name.get(named[-1], Recipe) if named else Recipe).model_fields)
