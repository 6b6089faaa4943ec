"""The golden vectors of `mask_vectors.json`, as arguments and what must come of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

VECTORS = json.loads((Path(__file__).parents[1] / "mask_vectors.json").read_text())
MASKS = VECTORS["keep_masks"]


def expected(vector: dict) -> np.ndarray:
    return np.array([[c == "1" for c in row] for row in vector["keep"]])


def probability(vector: dict) -> Any:
    return np.array(vector["p"]) if isinstance(vector["p"], list) else vector["p"]


def arguments(vector: dict) -> dict:
    return {name: value for name, value in vector.items() if name not in ("shape", "p", "keep")}
