"""One URL for many SGLang instances that share their KV cache. No torch, no sglang, no nixl.

One folder a noun. In dependency order (``test/architecture`` holds them to it):

``values``       what a decision is made of
``tree/``        who holds which page of which prefix
``cost/``        what computing and moving take, and what is under way
``policy/``      where a request is prefilled and decoded
``http/``        HTTP, bounded
``prompt/``      bodies to token ids
``members/``     the instances
``metrics/``     what is counted
``request/``     the life of an inference request
``simulate/``    the same decisions over instances that are not there
``control/``     every other route
``dashboard/``   the page at ``/dashboard``
``flags`` ``config``   the command line
``watching`` ``app``   putting it together
``processes/`` ``__main__``   the running service
"""
