"""WHERE blocks lie and how pages get there. Only ``copies``, ``pinning`` and ``swap`` import torch.

``layout``     the bytes of one block
``arena``      the memory all blocks lie in
``allocator``  which blocks are free
``lease``      pinned blocks as a value with a deadline, and blocks being filled
``backing``    memory handed over before it is needed
``attached``   what goes with the memory in use: its backing, and a device that reaches it
``huge_pages`` large memory pages for the engine's pool on a CPU
``pinning``    the parts of the arena that an accelerator reaches by itself
``copies/``    how bytes get from the engine's device pool to blocks and back
``swap``       the device pool with its copies
"""
