"""Moves blocks between instances. The receiver reads; see ``docs/transfer.md`` for the life cycle.

``base``      the seams: BlockStore, Pool, Transport
``plan``      descriptors of one read, merged and cut into submissions; pure
``regions``   which memory is registered, and what peers are told of it; pure
``outcome``   why a fetch ended
``port``      what a fetch needs of the world outside
``round``     one lease, what is read under it, and its release; pure
``holder``    one source of one fetch; pure
``state``     one fetch as a state machine without clock or sockets
``verify``    checksums of what was read, in a thread of their own
``grace``     pins that outlive their fetch
``loopback``  transport inside one process
``nixl``      transport over NIXL
``faulty``    a transport that fails on purpose
``serve``     the holder's side: leases granted to others, requests that wait
``peers``     whom a rank can talk to and read from
``members``   who belongs to the cluster; connected before the first fetch
``session``   the reader's side: the fetches of a rank, reads that were given up
``resizer``   changes of the pool's size, with the network told of them
``submissions``   fetches and sizes that other threads of this process ask for
``sockets``   the ZMQ sockets of a rank, as messages in and out
``client``    the HTTP process's end of a rank's local socket
``offer``     asks another rank to fetch from us
``loop``      what the agent's thread does, turn by turn
``agent``     the thread of a rank that owns all of it
"""
