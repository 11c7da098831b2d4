"""WHICH block holds which prefix. Pure: no clock, thread, socket or torch.

``eviction``     which page goes when room is needed, one module a policy
``local_index``  the page forest: keys, parents, pins, recency
``journal``      numbered batches of what became readable and what ceased to be
"""
