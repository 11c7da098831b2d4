"""The instances: who is there, what for, in which state. In dependency order:

``breaker``        when to leave one alone
``member``         one instance, and one request in flight to it
``departures``     those that have left, and those of them that are to stay away
``instances``      all of them
``models``         the names they serve
``polling``        a shell: asks those that do not register themselves
``introductions``  a shell: tells each who the others are
``pools``          a shell: what is in their MemPools
"""
