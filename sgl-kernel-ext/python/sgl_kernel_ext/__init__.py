"""Native core of MemServe. Knows tensors as addresses, so it depends on numpy alone.

Modules, in order of dependency:

- ``tables``, ``attention``: what the ops are handed
- ``reference``, ``reference_engine``, ``reference_attention``, ``reference_decoder``: every op in
  plain Python and numpy; the oracle, and what runs without a compiler
- ``switch``: whether native ops run
- ``_native``: the same in C++ (absent where it could not be built)
- ``engine``: the ops of a model's layers
- ``attention_ops``: paged attention
- ``ops``: the ops to call, native where ``_native`` is there and not switched off
"""

__version__ = "0.1.0"
