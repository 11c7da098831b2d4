"""What computing and moving take here, learnt while serving, and what is under way. Pure.

In dependency order:

``fit``       least squares that learns online
``flows``     pages on the move now
``spells``    timing prompts that are computed together
``learned``   seconds of prefill and of transfer, for each instance and pair
``backlog``   what one instance still has to compute
``coming``    pages that instances will hold soon
``bookings``  all that is decided and not yet seen done
"""
