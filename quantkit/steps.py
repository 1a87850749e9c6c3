"""The steps of a recipe with their code and checked options, in an order that makes sense."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ValidationError

from quantkit import registry
from quantkit.errors import RecipeError, did_you_mean
from quantkit.recipe import Recipe

if TYPE_CHECKING:
    from quantkit.calibrate.streams import StreamName


@dataclass(frozen=True)
class BoundStep:
    """A step of the recipe with its code and its checked options."""

    method: registry.Method
    module: ModuleType
    config: BaseModel

    @property
    def statistics(self) -> tuple[str, ...]:
        """What it wants to know of the inputs of linears, with these options."""
        own = getattr(self.module, "statistics", None)
        wanted: tuple[str, ...] = self.method.statistics if own is None else own(self.config)
        return wanted

    @property
    def needs_data(self) -> bool:
        return bool(self.statistics) or self.method.data

    @property
    def stream(self) -> StreamName:
        """The hidden states that its statistics are of."""
        return "float" if getattr(self.config, "inputs", "") == "float" else "quantised"


@dataclass(frozen=True)
class Steps:
    """Everything that is done to a block, in this order."""

    transforms: tuple[BoundStep, ...]
    rounding: BoundStep
    tuning: BoundStep | None

    @property
    def fuses(self) -> Literal["auto", "always", "never"]:
        """Is the residual stream of the whole model rotated before the first step? auto: if the model allows it."""
        wish: Literal["auto", "always", "never"] = "never"
        if self.transforms:
            wish = getattr(self.transforms[0].config, "fuses", "never")
        return wish

    @property
    def learn_steps(self) -> int:
        """In how many steps the rotation of the residual stream is learned."""
        return max((getattr(step.config, "learn_steps", 0) for step in self.transforms), default=0)

    def settled(self, fused: bool) -> Steps:
        """These steps, told whether the residual stream is rotated."""
        told = [
            replace(step, config=step.config.settled(fused and number == 0, number == 0))
            if hasattr(step.config, "settled")
            else step
            for number, step in enumerate(self.transforms)
        ]
        return replace(self, transforms=tuple(told))

    def __iter__(self) -> Iterator[BoundStep]:
        yield from (*self.transforms, self.rounding)
        if self.tuning:
            yield self.tuning

    @property
    def need_data(self) -> bool:
        return any(step.needs_data for step in self)

    @property
    def wants_float_stream(self) -> bool:
        """Does a step compare with what the samples are in the float model?"""
        return any(
            "cross" in step.statistics or step.stream == "float" or getattr(step.config, "target", "") == "float"
            for step in self
        )


def bind_steps(recipe: Recipe) -> Steps:
    """The recipe's steps, checked.

    Raises:
        RecipeError: an unknown method or option, not exactly one rounding, more than one tuning, or an order in which
            a step could do nothing.
    """
    bound = [_bind(number, step.method, step.options) for number, step in enumerate(recipe.steps)]
    roundings = [step for step in bound if step.method.kind == "rounding"]
    if len(roundings) != 1:
        given = " and ".join(step.method.name for step in roundings) or "none"
        known = ", ".join(name for name, method in registry.METHODS.items() if method.kind == "rounding")
        raise RecipeError(f"steps need exactly one rounding, got {given}; roundings: {known}.")
    place = bound.index(roundings[0])
    name = roundings[0].method.name
    for number, step in enumerate(bound):
        if step.method.kind == "transform" and number > place:
            raise RecipeError(
                f"step '{step.method.name}' comes after the rounding '{name}': a transform prepares weights for "
                "rounding, so put it first."
            )
        if number and getattr(step.config, "fuses", "never") == "always":
            raise RecipeError(
                f"step '{step.method.name}' with residual: always comes after '{bound[0].method.name}': the residual "
                "stream is rotated before any other step sees the model, so put it first, or leave residual out."
            )
        if step.method.kind == "tuning" and number < place:
            raise RecipeError(
                f"step '{step.method.name}' comes before the rounding '{name}': it makes up for what rounding did, so "
                "put it last."
            )
    seen: set[str] = set()
    for step in bound:
        if step.method.name in seen:
            raise RecipeError(f"step '{step.method.name}' is given twice; a method can be used once in a run.")
        seen.add(step.method.name)
    tunings = [step for step in bound if step.method.kind == "tuning"]
    if len(tunings) > 1:
        raise RecipeError(f"steps {' and '.join(step.method.name for step in tunings)} both tune; choose one of them.")
    return Steps(tuple(bound[:place]), roundings[0], tunings[0] if tunings else None)


def _bind(number: int, name: str, options: dict[str, object]) -> BoundStep:
    method = registry.get(name)
    module = method.load()
    try:
        config = module.Config.model_validate(options)
    except ValidationError as error:
        problems = []
        for problem in error.errors(include_url=False):
            key = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                problems.append(f"'{key}' is not an option. {did_you_mean(key, module.Config.model_fields)}")
            else:
                problems.append(f"{key} is {problem['input']!r}: {problem['msg']}")
        raise RecipeError(f"steps.{number} ({name}): " + "; ".join(problems)) from None
    return BoundStep(method, module, config)
