"""vaeq: how well does a VAE's aggregated posterior match its prior, and what does the gap cost?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vaeq.measurement import Measurement, measure

__version__ = "0.1.0"
__all__ = ["Measurement", "__version__", "measure"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `vaeq --help` and `vaeq report` start without importing torch.
    if name in ("Measurement", "measure"):
        import vaeq.measurement

        return getattr(vaeq.measurement, name)
    raise AttributeError(f"module 'vaeq' has no attribute {name!r}")
