"""The timm package, where torchvision's compiled operators can't be loaded: what is taken of it needs none of them."""

from __future__ import annotations

import importlib
from typing import Any

import torch

_OPERATORS: Any = None  # kept: they are gone with it


def timm() -> Any:
    """The module. Torchvision's wheels need CUDA's libraries to load their operators, and can't be imported without."""
    global _OPERATORS
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    _OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _OPERATORS.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("timm")
