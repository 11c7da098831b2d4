"""WHERE blocks lie and how pages get there. Only ``swap`` imports torch.

``layout``     the bytes of one block
``arena``      the memory all blocks lie in
``allocator``  which blocks are free
``lease``      pinned blocks as a value with a deadline, and blocks being filled
``swap``       copies between the engine's device pool and blocks
"""
