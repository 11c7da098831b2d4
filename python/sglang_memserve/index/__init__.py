"""WHICH block holds which prefix. Pure: no clock, thread, socket or torch.

``eviction``     which page goes when room is needed, one module a policy
``local_index``  the page forest: keys, parents, pins, recency
``holds``        pages that stay until the request takes them for which they were fetched
``chains``       pages and their parents as runs, parents first
``journal``      numbered batches of what became readable and what ceased to be
``intersection`` what all ranks of an instance hold, from the events of each
"""
