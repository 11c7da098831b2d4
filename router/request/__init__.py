"""The life of an inference request. In dependency order:

``admission``   the door: how many at once, how many wait
``frames`` ``resumable`` ``streams``   what of an answer can outlive its instance (pure)
``client``      the client's side: its body, its leaving, what it has been sent
``live``        who is served now, and how to stop it everywhere
``placement``   token ids to a plan
``turn``        one request and where it goes next
``journal``     the last requests and transfers
``prefill`` ``fetches`` ``steps``   what comes before decode
``prepare``     all of it
``interrupts`` ``forward``   to the decode instance, and its answer back
``patience`` ``resume``   going on where an instance was lost
``dispatch``    the whole
``passthrough`` every route that the router has no opinion on
"""
