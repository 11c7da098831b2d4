"""HTTP, bounded: what every part that talks to clients or instances stands on.

In dependency order:

``ids`` ``limits``      names and bounds of one request
``headers``             between client, router and instances
``replies``             the router's own answers, as ASGI messages
``security``            keys, TLS
``faults``              what went wrong on the way to an instance
``proxy``               requests to instances
``connection``          one client's connection
``listening``           sockets
``in_process``          requests to an application of this process
``shortcut``            the way around the web framework for what is asked all the time
"""
