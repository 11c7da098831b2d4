"""What instances, ranks and routers say to each other. Pure values and codecs; no sockets.

``events``     residency of pages, in SGLang's own KV-event format, and the snapshot
``position``   where a subscriber stands in such a stream
``handshake``  namespaces, layout hash, protocol version
``control``    rank to rank (hello, lease, release) and HTTP process to its ranks (fetch, stats)
``access``     which of an instance's keys opens which of its routes
``http``       bodies of ``/memserve/*`` on instances and on the router
"""

import msgspec

PROTOCOL_VERSION = 1

# All that msgspec raises for bytes of a stranger; RecursionError is its answer to deep nesting.
UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
