"""What the workers of a sweep begin with: imported once, by the process they are forked from."""

from __future__ import annotations

from vaeq.loading import loading

with loading():
    import scipy.special  # noqa: F401

    import vaeq.experiment  # noqa: F401
