"""Which page goes when room is needed: one module a policy. Pure: no clock but its own counting.

In dependency order:

``base``       the protocol
``heap``       evictable blocks by recency
``ghosts``     pages evicted not long ago
``lru``        least recently used leaf first
``two_queue``  pages prove themselves before they may displace others (the default)
``registry``   policies by name
"""
