"""What a fleet would do with recorded traffic: discrete events over the router's own decisions.

Real are the merged tree, the members, the cost model and all it learns, the bookings, the policies
and the placement of a request: the same objects that serve. Modelled are the instances and the
network, after a ``profile``:

- an instance computes prompts in one queue, in chunks, before its streams go on; a step takes
  ``fixed + a * new + b * new * (before + new / 2)``; streams share decode steps, whose time grows
  with their number and their context;
- HBM holds KV slots, DRAM MemPool's pages, both evicted leaf first by the product's index;
- transfers have a latency and share the ways out of and into an instance; pages move while their
  prompt is computed;
- heartbeats come every two seconds, events a little late.

Left out: failures and deadlines of prefills, retries, tokenizing and the router's own time but for
``hop_s``, streams that are put out for want of room, and, where the trace does not tell what
became of them, generated tokens as cache. docs/simulator.md says more.

In dependency order:

``agenda``       virtual time
``profile``      what an instance can do
``trace``        recorded requests
``pages``        one tier of one instance
``memory``       both tiers
``engine``       prefill and decode steps
``network``      bytes between instances
``instance``     all of one instance
``approximate``  the peer: a tree of what was sent
``report``       what it came to
``bound``        the least that it could come to
``moves``        fetches
``journey``      one request
``fleet``        the whole
``command``      the command line
"""
