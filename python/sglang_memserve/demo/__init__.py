"""``python -m sglang_memserve.demo``: a cluster on a real model, shown and checked.

``observe``   what a request did: response headers, the engine's own numbers, bytes moved
``programs``  the requests: a frontend program, a chat with streaming, the same prompts again
``checks``    pure: what must be true of the observations
``report``    tables and JSON
"""
