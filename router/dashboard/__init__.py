"""The page at ``/dashboard``: what an operator sees of the router. In dependency order:

``outline``  the merged tree as a drawing of bounded size (pure)
``survey``   reads the tree for it, a little at a time
``view``     members, requests, transfers and totals as JSON (pure)
``routes``   the page, its data and its stream of events

``static/`` holds the page itself: plain ES modules, nothing built, nothing from elsewhere.
"""
