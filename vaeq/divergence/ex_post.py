"""An ex-post prior: a density fitted to the codes after training (Ghosh et al. 2020, section 4).

r(z) = Σ_k w_k N(z; m_k, C_k), fitted to z ~ q_N, takes the place of N(0, I) for the same decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vaeq.divergence.densities import (
    FULL_MIXTURE_DIMS,
    Chart,
    Charted,
    Gaussian,
    draw,
)
from vaeq.divergence.stepwise_em import fit_gaussian_mixture
from vaeq.posterior.aggregated import AggregatedPosterior

# Tried beside the moment-matched Gaussian, as long as a component has its images.
COMPONENTS = (10, 30, 100, 300)
IMAGES_A_COMPONENT = 20
VALIDATION_IMAGES = 2_000


@dataclass(frozen=True)
class ExPost:
    """The density chosen, and what the validation images said of every one tried."""

    density: Gaussian | Charted
    components: int
    validation: dict[int, float]  # components → mean log r(z), nats, on validation images


def fit_ex_post(
    training: AggregatedPosterior,
    generator: torch.Generator,
    *,
    components: tuple[int, ...] = COMPONENTS,
) -> ExPost:
    """Fit Gaussian mixtures to training codes and choose their size on a part kept out.

    The choice maximizes the mean of log r(z) over z ~ q(z|x) of up to 2,000 training images, at
    most a sixth, that no fit has seen: it estimates −KL(q ‖ r) up to a constant. One component is
    the moment-matched Gaussian. Held-out images play no part.

    Args:
        training: codes of the images the encoder was trained on.
        generator: on the CPU, or on the device of the codes.
        components: sizes to try; those above n/20 are left out.

    References:
        Ghosh, Sajjadi, Vergari, Black & Schölkopf (2020), From variational to deterministic
        autoencoders, section 4.
    """
    count = min(VALIDATION_IMAGES, training.n // 6)
    order = torch.randperm(training.n, generator=generator, device=generator.device)
    order = order.to(training.device)
    fitted = training.subset(order[count:])
    mean, covariance = fitted.moments()
    gaussian = Gaussian("Gaussian", mean.to(training.device), covariance.to(training.device))
    densities: dict[int, Gaussian | Charted] = {1: gaussian}
    chart = Chart(fitted)
    if count and chart.dims:
        codes = chart.codes(fitted)
        for size in components:
            if 1 < size <= fitted.n // IMAGES_A_COMPONENT:
                mixture = fit_gaussian_mixture(
                    *codes, size, diagonal=chart.dims > FULL_MIXTURE_DIMS, generator=generator
                )
                densities[size] = Charted(mixture.name, chart, mixture)
    if not count:
        return ExPost(gaussian, 1, {})
    some = training.subset(order[:count])
    z = draw(some.mean.double(), some.logvar.double(), generator)
    validation = {size: float(r.log_prob(z).mean()) for size, r in densities.items()}
    best = max(validation, key=lambda size: validation[size])
    return ExPost(densities[best], best, validation)
