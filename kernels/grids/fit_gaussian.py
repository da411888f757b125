"""Fits the grids with the least squared error for N(0, I_p) and writes them where the tables look.

Scalars (p = 1): Lloyd's iteration with the exact integrals of a normal over each cell (Lloyd 1982;
Max 1960). Pairs (p = 2): the LBG iteration (Linde, Buzo & Gray 1980) over a low-discrepancy sample
of the plane, from a sunflower whose density is that of the best grid, f^(p / (p + 2)), so that no
restarts are needed. Two minutes on one core.

    python kernels/grids/fit_gaussian.py
"""

import json
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import norm, qmc

TARGET = Path(__file__).parents[1] / "lqec_kernels" / "gaussian_grids.json"
GOLDEN_ANGLE = np.pi * (3 - np.sqrt(5))
# (log2 of the sample, iterations): coarse first, to move far cheaply.
PASSES = ((17, 150), (21, 40))


def fit_scalar(bits: int) -> tuple[np.ndarray, float]:
    """Returns the levels, sorted, and their squared error."""
    levels = norm.ppf((np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(20000):
        ends = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        mass = np.diff(norm.cdf(ends))
        new = -np.diff(norm.pdf(ends)) / mass
        if np.abs(new - levels).max() < 1e-13:
            break
        levels = new
    # The error of a centroid grid is the variance less that of the levels.
    return levels, 1 - np.sum(mass * levels**2)


def fit_pairs(count: int) -> tuple[np.ndarray, float]:
    """Returns `count` points of the plane and their squared error a coordinate."""
    part = (np.arange(count) + 0.5) / count
    radius = np.sqrt(-4 * np.log(1 - part))  # of N(0, 2 I), whose density is f^(1/2)
    angle = GOLDEN_ANGLE * np.arange(count)
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    for log_samples, iterations in PASSES:
        sample = norm.ppf(qmc.Sobol(2, seed=0).random_base2(log_samples))
        for _ in range(iterations):
            distance, nearest = cKDTree(points).query(sample)
            members = np.maximum(np.bincount(nearest, minlength=count), 1)
            points = np.stack(
                [np.bincount(nearest, axis, count) / members for axis in sample.T], axis=1
            )
    return points, float(np.mean(distance**2) / 2)


def main() -> None:
    grids = {}
    for bits in (1, 2, 3, 4):
        levels, error = fit_scalar(bits)
        print(f"gauss{bits}: {error:.6f}")
        grids[f"gauss{bits}"] = [[level] for level in levels]
    for bits in (2, 3, 4):
        points, error = fit_pairs(4**bits)
        print(f"gauss{bits}_p2: {error:.6f}")
        order = np.lexsort(points.T[::-1])
        grids[f"gauss{bits}_p2"] = points[order].tolist()
    rounded = {
        name: [[float(f"{number:.9g}") for number in point] for point in grid]
        for name, grid in grids.items()
    }
    lines = ",\n".join(f'"{name}": {json.dumps(grid)}' for name, grid in rounded.items())
    TARGET.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
