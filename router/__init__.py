"""One URL for many SGLang instances that share their KV cache. No torch, no sglang, no nixl.

In dependency order:

``values``         what a decision is made of
``global_tree``    who holds which page
``native_tree``    the same over the native core
``merged_tree``    the one of the two that this machine runs
``fit`` ``flows`` ``spells`` ``cost``   what computing and moving take
``backlog`` ``coming`` ``bookings``   what is decided and not yet seen done
``policy/``        where a request is prefilled and decoded
``security`` ``connection``   keys, TLS, bounds of a connection
``flags`` ``config`` ``limits``   the command line, bounds of a request
``breaker`` ``member`` ``instances``   who is there, in which state
``source`` ``feed`` ``polling``   shells: residency events, listed URLs
``trust``          what of a match to count on
``prompts`` ``chat_template`` ``pieces`` ``tokenize``   bodies to token ids
``ids`` ``headers`` ``replies`` ``models``   what is said to clients and instances
``labels`` ``metrics`` ``source_metrics``   what is counted
``proxy`` ``live``   HTTP to instances, and stopping it
``introductions``  a shell: tells instances who the others are
``placement``      token ids to a plan
``fetches`` ``prefill`` ``steps``   what comes before decode
``resumable`` ``streams`` ``interrupts`` ``patience`` ``resume``   outliving an instance
``admission`` ``drain`` ``workers``   the door, ending well, what operators do to workers
``asgi`` ``turn`` ``prepare`` ``forward`` ``dispatch`` ``passthrough`` ``shortcut``   requests
``members`` ``control`` ``explain`` ``aliases``   everything else
``openapi``        what the router says of itself
``app``            putting it together
``place`` ``in_process`` ``merge`` ``siblings``   one of several processes, and the others
``listening`` ``serving`` ``processes`` ``__main__``   a process; several of them
"""
