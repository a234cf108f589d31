"""Confidence intervals. Standard library only."""

import math


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """Return the 95% interval of a proportion, 0 to 1.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal
    of the American Statistical Association 22 (1927), 209-212. Unlike the normal approximation it
    holds for few images and near 0 and 1.
    """
    if total == 0:
        return 0.0, 1.0
    z = 1.959964  # the normal distribution's 0.975 quantile
    share = hits / total
    centre = share + z**2 / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
