"""The golden vectors of `mask_vectors.json` and `mask_vectors_1_1.json`, as arguments and what must come of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

VECTORS, ADDED = (
    json.loads((Path(__file__).parents[1] / f"mask_vectors{version}.json").read_text()) for version in ("", "_1_1")
)
MASKS = VECTORS["keep_masks"] + ADDED["keep_masks"]


def expected(vector: dict) -> np.ndarray:
    return np.array([[c == "1" for c in row] for row in vector["keep"]])


def probability(vector: dict) -> Any:
    p = vector["p"]
    return tuple(p["range"]) if isinstance(p, dict) else np.array(p) if isinstance(p, list) else p


def arguments(vector: dict) -> dict:
    return {name: value for name, value in vector.items() if name not in ("shape", "p", "keep")}
