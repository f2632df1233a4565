"""What an optimiser step uses, as functions of the recipe, the seed and the step's index alone.

Nothing here has state, so a resumed run draws what the undisturbed one would have drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

DRAWN, ANNEALED = "drawn", "annealed"
SCHEDULES = (DRAWN, ANNEALED)


def hashed_integer(*parts: int | str) -> int:
    """A 63-bit integer from `parts`: the same on every platform, Python version and process."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_compression(compressions: Sequence[float], seed: int, step: int) -> float | None:
    """The compression factor of optimiser step `step` (0-based), uniform over `compressions`; None for no choice."""
    if not compressions:
        return None
    return float(compressions[hashed_integer("compression", seed, step) % len(compressions)])


def annealed_compression(compressions: Sequence[float], step: int, steps: int) -> float:
    """The compression factor of optimiser step `step` (0-based) of `steps`: one after another, an equal share each."""
    return float(compressions[min(step, steps - 1) * len(compressions) // steps])


def is_random(share: float, seed: int, step: int) -> bool:
    """Whether optimiser step `step` (0-based) is of the `share` (0 to 1) whose tokens are kept at random."""
    return hashed_integer("random", seed, step) < share * 2**63


def learning_rate_factor(step: int, steps: int, warmup_steps: int, floor: float) -> float:
    """Multiple of the peak learning rate at optimiser step `step` (0-based): linear warm-up, then a cosine to `floor`.

    The first step already moves (`1 / warmup_steps`); `floor`, a fraction of the peak, would come at `step == steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
