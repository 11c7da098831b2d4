"""How a request is placed: one module a policy, all pure functions of values.

In dependency order:

``base``         the protocol, rotation, and what all policies share
``cost``         least predicted time to first token (the default)
``prefix``       longest match
``session``      one client, one instance
``least_load``   fewest requests
``round_robin``  each in turn
``registry``     policies by name

Names on the command line are in ``registry.POLICIES``.
"""
