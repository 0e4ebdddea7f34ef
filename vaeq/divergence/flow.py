"""A neural spline flow (Durkan et al. 2019) on a Gaussian mixture, with the optional extra zuko."""

from __future__ import annotations

import importlib.util
import math

import torch

from vaeq.divergence.densities import GaussianMixture, draw, features

# Autoregressive networks of more inputs than this would train for longer than they are worth.
FLOW_DIMS = 64
_TRANSFORMS = 3
_HIDDEN = 64
_STEPS = 800
_BATCH = 512
_LEARNING_RATE = 2e-3


def flow_missing() -> str | None:
    """Why no flow can be fitted here, or None."""
    if importlib.util.find_spec("zuko") is None:
        return "zuko is not installed; pip install 'vaeq[flow]'"
    return None


class SplineFlow(torch.nn.Module):
    """log r(z) = log Σ_k w_k N(T(z); m_k, C_k) + log |det ∂T/∂z|, T monotone rational-quadratic."""

    def __init__(self, base: GaussianMixture, transform: torch.nn.Module) -> None:
        super().__init__()
        self.name = f"flow: neural splines on {base.name}"
        self.transform = transform
        self._natural = base.natural.float()
        self._diagonal = base.covariance.ndim == 2

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """log r(z) in float32."""
        y, log_jacobian = self.transform().call_and_ladj(z)
        joint = features(y, self._diagonal) @ self._natural
        return joint.logsumexp(1) + log_jacobian

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log r(z) of z (S, d), float64."""
        with torch.no_grad():
            return torch.cat([self(part.float()) for part in z.split(2048)]).double()


def fit_flow(
    base: GaussianMixture,
    mean: torch.Tensor,
    logvar: torch.Tensor,
    *,
    generator: torch.Generator | None = None,
    steps: int | None = None,
) -> SplineFlow:
    """Maximize E_{z ~ q_N} log r(z) by Adam, each batch with fresh draws of z.

    The flow starts as the identity, so r starts as the mixture and training can only bend it.

    Args:
        base: a mixture fitted to the same codes.
        mean, logvar: codes (n, d), about standardized, float32.
        generator: source of randomness.
        steps: of 512 images each; 800 unless told.
    """
    import zuko

    steps = _STEPS if steps is None else steps

    # zuko's initialization draws from the global stream, which is left as it was found.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0 if generator is None else generator.initial_seed())
        transform = zuko.flows.NSF(
            mean.shape[1], transforms=_TRANSFORMS, hidden_features=[_HIDDEN] * 2
        ).transform
    for autoregressive in transform.transforms:
        last = [m for m in autoregressive.modules() if isinstance(m, torch.nn.Linear)][-1]
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
    flow = SplineFlow(base, transform).to(mean.device)
    parameters = list(flow.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=1e-3)
    source = mean.device if generator is None else generator.device
    # Small operations: a second thread would spend its time waiting for the first.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            members = torch.randint(len(mean), (_BATCH,), generator=generator, device=source)
            members = members.to(mean.device)
            with torch.enable_grad():
                loss = -flow(draw(mean[members], logvar[members], generator)).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return flow.requires_grad_(False)
