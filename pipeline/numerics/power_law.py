"""Power laws fitted to the tail of a spectrum (Clauset et al., 0706.1062). E = eigenvalues in ascending order."""

import torch
from torch import Tensor

_NUM_BINS = 100


def tail_exponent(eigenvalues_E: Tensor) -> float:
    """The exponent of the power law that the tail of a spectrum follows, 1 where it follows none.

    The tail begins near the peak of the histogram of the eigenvalues' logarithms, from 0.95 to 1.5 times its edge.
    """
    sorted_E = eigenvalues_E[eigenvalues_E > 0].double().sort().values
    if len(sorted_E) < 2:
        return 1.0
    peak = histogram_peak(sorted_E)
    return fitted_exponent(sorted_E, 0.95 * peak, 1.5 * peak)


def histogram_peak(sorted_E: Tensor) -> float:
    """The left edge of the fullest of 100 bins between the logarithms of the smallest and the largest eigenvalue."""
    logarithm_E = sorted_E.log10()
    low, high = float(logarithm_E[0]), float(logarithm_E[-1])
    counts = torch.histc(logarithm_E, _NUM_BINS, min=low, max=high)
    return float(10 ** torch.linspace(low, high, _NUM_BINS + 1, dtype=torch.float64)[int(counts.argmax())])


def fitted_exponent(sorted_E: Tensor, lowest: float, highest: float) -> float:
    """The exponent of the best law of all tails that begin at an eigenvalue from `lowest` to `highest`.

    Each is fitted by maximum likelihood (Hill's estimator); the best has the least distance of Kolmogorov and Smirnov.
    """
    logarithm_E = sorted_E.log()
    sum_from_E = logarithm_E.flip(0).cumsum(0).flip(0)
    nearest, best = 1.0, 1.0
    for start in range(len(sorted_E) - 1):
        if not lowest <= float(sorted_E[start]) <= highest:
            continue
        num_tail = len(sorted_E) - start
        excess = float(sum_from_E[start] - num_tail * logarithm_E[start])
        if excess <= 0:
            continue
        exponent = 1 + num_tail / excess
        expected_E = 1 - (sorted_E[start:] / sorted_E[start]) ** (1 - exponent)
        seen_E = torch.arange(num_tail, device=sorted_E.device, dtype=sorted_E.dtype) / num_tail
        distance = float((expected_E - seen_E).abs().max())
        if distance < nearest:
            nearest, best = distance, exponent
    return best
