"""HOW bytes get from the engine's device pool to blocks and back: one contract, several ways.

``base``     the contract; the pool's tensors and the arena as rows; which row goes where
``native``   a device pool in host memory: one native call for all tensors
``cpu``      the same without native code: TorchScript
``streams``  queues of device work and their events, as far as copies need them
``staged``   any accelerator: torch operations, through pinned staging memory
``moves``    the Triton kernels: all layers, K and V, in one launch a direction
``direct``   kernels that reach into pinned blocks themselves
``packed``   kernels to and from packed device memory, and the copy engine from there
``choice``   which of the last three, for each copy

``direct`` and ``packed`` need blocks the device can reach (``memory.pinning``).
"""
