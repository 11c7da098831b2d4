"""Who holds which page of which prefix, in which tier, on all instances. In dependency order:

``reference``  the merged radix tree in Python: theory of operation, oracle and stand-in
``native``     the same over the native core
``merged``     the one of the two that this machine runs
``source``     one instance's residency events into the tree: gaps, snapshots, restarts
``feed``       a shell: subscribes to every instance's events
``trust``      what decisions make of events that are not complete
``metrics``    the event streams in numbers
"""
