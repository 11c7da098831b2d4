"""``python -m sglang_memserve.router``: start the router and serve until told to stop."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from sglang_memserve.errors import MemServeError

from .config import parse_args
from .processes.place import read_place

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """The process's exit status: 0 after a SIGTERM, SIGHUP or Ctrl-C, 2 for a bad command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        config, place = parse_args(words), read_place()
        config.require_tokenizer()
        logging.basicConfig(
            level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        if config.warning and place is None:
            logger.warning("%s", config.warning)
        # One that only watches others need not load what serves.
        if config.processes > 1 and place is None:
            from .processes.supervisor import supervise

            return supervise(config, words)
        from .processes.serving import run

        run(config, place)
    except MemServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
