"""What ``mempool`` is made of beneath its lock. Nothing here is thread-safe but ``Resize``.

``arguments`` what callers may ask for
``ledger``  which block is in which state: index, allocator, leases, stores and journal together
``hold``    pages that stay for a request, as a value
``shrink``  emptying the last blocks: their pages move down or are evicted
``resize``  one change of the pool's size, step by step
"""
