"""What a node is given over links, which ComfyUI passes on as it comes, and checked is what it is.

Values that are typed in are checked by ComfyUI before a prompt runs, and file names by
`validate_inputs`.
"""

import math
import operator
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from inspect import signature
from typing import Any

from ..engine.errors import EngineError
from ..engine.torch_state import own_state
from ..messages import MajicFluxError
from .advice import advise

# What travels on a socket: its class, by name, because the modules take seconds to import.
CLASSES = {
    "CONDITIONING": "builtins.list",
    "IMAGE": "torch.Tensor",
    "LATENT": "builtins.dict",
    "MASK": "torch.Tensor",
    "SIGMAS": "torch.Tensor",
    "MAJICFLUX_CONTROL": "builtins.tuple",  # of engine.flux.controlnet.Control
    "MAJICFLUX_DIT": "..engine.flux.transformer.DiT",
    "MAJICFLUX_TEXT_ENCODERS": "..engine.flux.text_encoders.TextEncoders",
    "MAJICFLUX_VAE": "..engine.flux.vae.VAE",
    "MAJICFLUX_PIPELINE": "..engine.run.pipeline.Pipeline",
}


def checked(execute: Callable[..., Any]) -> Callable[..., Any]:
    """An `execute` that is given values as its schema declares them, and no others.

    Numbers may come as text or as tensors; an optional input that is given None counts as absent.
    Raises MajicFluxError by the name of the input. It runs with PyTorch's own defaults, and
    what the engine refuses comes with advice.
    """
    parameters = signature(execute)

    @wraps(execute)
    def run(cls: Any, *values: Any, **inputs: Any) -> Any:
        given = parameters.bind(cls, *values, **inputs).arguments
        validate = getattr(cls, "validate_inputs", None)
        validated = () if validate is None else signature(validate).parameters
        for socket in cls.define_schema().inputs:
            if socket.id not in given:
                continue
            if given[socket.id] is None and socket.optional:
                del given[socket.id]
                continue
            limits = {} if socket.id in validated else socket.as_dict()
            given[socket.id] = _value(socket.id, socket.io_type, given[socket.id], limits)
        try:
            with own_state():
                return execute(**given)
        except EngineError as error:
            advise(error)
            raise

    return run


def _value(name: str, io_type: str, value: Any, limits: dict[str, Any]) -> Any:
    if io_type in CLASSES:
        module, _, kind = CLASSES[io_type].rpartition(".")
        if not isinstance(value, getattr(import_module(module, __package__), kind)):
            found = type(value).__name__
            raise MajicFluxError(
                "{where} takes {wanted}, but is linked to {found}.",
                where=name,
                wanted=io_type,
                found=found,
            )
        return value
    found = READ[io_type](name, value)
    low, high = limits.get("min", found), limits.get("max", found)
    if not low <= found <= high:
        values = {"low": low, "high": high, "value": found}
        raise MajicFluxError("{where} must be {low} to {high}, not {value}.", where=name, **values)
    if found not in limits.get("options", [found]):
        choices = ", ".join(limits["options"])
        raise MajicFluxError(
            "{where} must be one of: {choices}; not {value}.",
            where=name,
            choices=choices,
            value=brief(found),
        )
    return found


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, str):
            return int(value)
        try:
            return operator.index(value)  # exact, as a seed has to be
        except TypeError:
            if float(value).is_integer():
                return int(value)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        pass
    raise MajicFluxError(
        "{where} must be a whole number, not {value!r}.", where=name, value=brief(value)
    )


def _number(name: str, value: Any) -> float:
    try:
        if math.isfinite(number := float(value)):
            return number
    except (OverflowError, RuntimeError, TypeError, ValueError):
        pass
    raise MajicFluxError(
        "{where} must be a number, not {value}.", where=name, value=repr(brief(value))
    )


def _switch(name: str, value: Any) -> bool:
    try:
        if not isinstance(value, str) and float(value) in (0, 1):
            return bool(value)
    except (RuntimeError, TypeError, ValueError):
        pass
    raise MajicFluxError(
        "{where} must be true or false, not {value!r}.", where=name, value=brief(value)
    )


def _text(name: str, value: Any) -> str:
    if isinstance(value, (str, int, float)):
        return str(value).encode(errors="replace").decode()  # halves of characters, which some cut
    raise MajicFluxError("{where} must be a text, not {value!r}.", where=name, value=brief(value))


READ: dict[str, Callable[[str, Any], Any]] = {
    "BOOLEAN": _switch,
    "COMBO": _text,
    "FLOAT": _number,
    "INT": _whole,
    "STRING": _text,
}


def brief(value: Any) -> Any:
    """What a message shows of a value: of what is long or no plain value only the kind."""
    plain = isinstance(value, (str, int, float, type(None))) and len(str(value)) <= 100
    return value if plain else type(value).__name__
