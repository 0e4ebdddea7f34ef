"""Pure estimators of every reading of "q(z) is close to N(0, I)": tensors in, Estimates out."""

from __future__ import annotations

from vaeq.divergence.decomposition import decompose, kl_per_image, marginal_kl
from vaeq.divergence.marginals import marginals
from vaeq.divergence.moments import gaussian_kl, moment_kl

__all__ = ["decompose", "gaussian_kl", "kl_per_image", "marginal_kl", "marginals", "moment_kl"]
