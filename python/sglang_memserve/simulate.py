"""``python -m sglang_memserve.simulate``: what a fleet would do with recorded traffic.

Thin: ``sglang_memserve.router.simulate`` says what is modelled, docs/simulator.md how to use it.
"""

from __future__ import annotations

import sys

from .router.simulate.command import main

if __name__ == "__main__":
    sys.exit(main())
