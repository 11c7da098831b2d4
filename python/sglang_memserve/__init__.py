"""MemServe for SGLang: one KV-cache pool over all instances.

Modules, lowest first (imports only ever point down this list):

``types, errors``      the shared nouns and the exception tree
``config``             settings, parsed once at the edge
``hashing``            page keys, equal to SGLang's
``protocol/``          what instances and routers say to each other
``index/``             which block holds which prefix
``memory/``            where blocks lie and how pages are copied
``transfer/``          how blocks move between instances
``mempool``            the paper's verbs over index, memory and transfer
``plugin/``            the only folder that touches SGLang
``launch_*, demo*``    entries
``router/``            the global tree and the routing decision; never imports torch
"""

__version__ = "0.1.0"
