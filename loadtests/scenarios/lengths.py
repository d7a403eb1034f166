"""How long prompts and answers are, in tokens. Pure: randomness is an argument.

FITS are log-normal fits to published traces: mean and deviation of the logarithm of the length. A fit is not the trace:
a tail that a log-normal has and a trace has not is cut by ``most``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fit:
    """A log-normal. ``most``: what the trace itself does not exceed much; ``source``: where it comes from."""

    mu: float
    sigma: float
    most: int
    source: str


_AZURE = "AzurePublicDataset, LLM inference trace of 2023"
FITS: Mapping[str, Fit] = {
    "azure-conversation-input": Fit(6.63, 0.99, 4500, f"{_AZURE}, conversation: p50/90/99 1020/2734/4142"),
    "azure-conversation-output": Fit(5.02, 0.86, 1000, f"{_AZURE}, conversation: p50/90/99 129/424/601"),
    "azure-code-input": Fit(7.00, 1.36, 7500, f"{_AZURE}, code: p50/90/99 1469/5188/7436"),
    "azure-code-output": Fit(2.79, 0.85, 500, f"{_AZURE}, code: p50/90/99 13/55/251"),
    "mooncake-input": Fit(8.74, 1.20, 120_000, "Mooncake, conversation: p50/90/99 6909/27.4k/85.4k"),
    "servegen-input": Fit(6.24, 1.18, 6000, "ServeGen, m-large: p50/90/99 601/2371/5452"),
    "servegen-output": Fit(3.64, 2.05, 1000, "ServeGen, m-large: p50/90/99 53/461/872"),
    "reasoning-output": Fit(6.77, 0.97, 16_000, "ServeGen, deepseek-r1: p50/90/99 792/3432/12.6k"),
    "arxiv-input": Fit(7.83, 0.35, 4096, "arXiv summarisation, Vidur: p50/90 2730/3702"),
    "arxiv-output": Fit(5.12, 1.05, 3271, "arXiv summarisation, Vidur: mean 291, p50 167"),
    "lmsys-input": Fit(3.69, 1.56, 4000, "LMSYS-based trace of VTC: mean 136, p50 40"),
    "lmsys-output": Fit(5.35, 0.62, 1000, "LMSYS-based trace of VTC: mean 256, p50 211"),
}


def lognormal(mu: float, sigma: float, chance: random.Random) -> int:
    """A length."""
    return round(chance.lognormvariate(mu, sigma))
