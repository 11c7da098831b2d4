"""Serving, measured from a client's side.

``python -m benchmark.serving --list`` says what is there.

    setups    what is compared: instances, what routes to them, by name
    servers   their processes, one core an instance
    replay    the client: a workload's requests, each when its time and its turn have come
    summary   samples to figures; the router's token funnel
    fronts    what stands before a fleet: our router, sglang-router, a plain proxy
    proxy     that plain proxy, for vLLM
    neighbours  how much of the machine other work took meanwhile
    trace     what was replayed, for the simulator
    calibrate one instance's figures, for the simulator
    __main__  the command

Beside them four measurements of one question each, run by their own file names: ``moved_prefix``,
``pipelined_fetch``, ``scheduler_share``, ``cost_of_memserve``.
"""
