"""The published methods by name, and one's own by `path/to/file.py:Class`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from chainrule.errors import UserError, unknown
from chainrule.methods.method import Method
from chainrule.methods.plain import SDO, AlignProp, DRaFT, DRaFTLV, DRTune, ReFL
from chainrule.methods.policy import DDPO, DPG, GRPO
from chainrule.methods.shortft import ShortFT
from chainrule.methods.surrogates import FlowBPBridge, FlowBPLagrange, FlowBPSparse, LeapAlign
from chainrule.named import Catalog, is_place, name_and_options

REGISTRY: dict[str, type[Any]] = {
    "draft": DRaFT,
    "draft-lv": DRaFTLV,
    "refl": ReFL,
    "alignprop": AlignProp,
    "drtune": DRTune,
    "sdo": SDO,
    "shortft": ShortFT,
    "dpg": DPG,
    "ddpo": DDPO,
    "grpo": GRPO,
    "flowbp-sparse": FlowBPSparse,
    "flowbp-bridge": FlowBPBridge,
    "flowbp-lagrange": FlowBPLagrange,
    "leapalign": LeapAlign,
}
METHODS: Catalog[Method] = Catalog("method", REGISTRY)


def describe(name: str) -> str:
    """The first line of a method's docstring: what it does, and its drawing."""
    return (inspect.getdoc(REGISTRY[name]) or "").splitlines()[0]


def spelled(method: Method) -> dict[str, Any]:
    """The name and options that `read` turns back into this method; see `Catalog.spelled`."""
    return METHODS.spelled(method)


def read(given: object) -> Method:
    """A method from its name, or from its name with options, `{"name": "draft", "k": 5}`. Raises UserError for anything else."""
    return make(*name_and_options(given, "method"))


def as_method(given: str | Method) -> Method:
    """A method, or one by name. Raises UserError for an unknown name, a class instead of an object, and anything else."""
    if isinstance(given, type):
        raise UserError(f"the method is the class {given.__name__}; give an object, {given.__name__}()")
    if isinstance(given, str) or not callable(getattr(given, "plan", None)):
        return read(given)
    return given


def make(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """A method by name: `draft`, `draft-5` (k = 5), `draft-lv`, `alignprop-1`, ... or `path/to/file.py:Class`.

    Its fields are the options. Raises UserError for an unknown name or option, with the nearest known one, and for a value that
    is not of the field's type.
    """
    options, key = dict(options or {}), name.lower().replace("_", "-")
    head, _, tail = key.rpartition("-")
    if key == "alignprop-1":
        key, options = "alignprop", {"last_only": True} | options
    elif head == "draft" and tail.isdecimal():
        key, options = "draft", {"k": int(tail)} | options
    elif is_place(name):
        key = name
    elif key not in REGISTRY:
        raise unknown("method", name, [*REGISTRY, "draft-K", "alignprop-1"])
    made = METHODS.make(key, options)
    if not callable(getattr(made, "plan", None)):
        raise UserError(f"{name} has no plan, but a method must have one: plan(grid, rng) -> Plan")
    return made
