"""WHICH block holds which prefix. Pure: no clock, thread, socket or torch.

``eviction``     the leaves of the page forest, oldest first
``local_index``  the page forest: keys, parents, pins, recency
``journal``      numbered batches of what became readable and what ceased to be
"""
