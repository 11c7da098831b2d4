"""A MemServe instance that keeps nothing of a request that has ended.

    python -m benchmark.serving.forgetful [launch_server's flags]

For PD-Caching-1 of the MemServe paper (section 5.1), whose decode instances have no cache: prefill
keeps its pages, and every prompt moves whole. A real instance but for its linker.
"""

from __future__ import annotations

import sys

from sglang_memserve import launch_server
from sglang_memserve.plugin import flags


def main() -> int:
    # Each scheduler process imports its linker by these. Not here: torch must not be imported
    # before the launcher has said how many threads it gets.
    flags.LINKER_MODULE = "benchmark.serving.forgetful_linker"
    flags.LINKER_CLASS = "ForgetfulLinker"
    return launch_server.main()


if __name__ == "__main__":
    sys.exit(main())
