"""``python -m vaeq``: the same program as ``vaeq``."""

from __future__ import annotations

from vaeq.cli import main

if __name__ == "__main__":
    main()
