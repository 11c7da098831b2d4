"""A router and instances on this machine, started and ended together.

``guard``       stand-alone script: runs one command and takes its whole tree down with its parent
``process``     one guarded process: start, watch, end, the tail of its log
``plan``        pure: from the command line and the machine to one command line a process
``machine``     what this machine has: cores, memory, accelerators, free ports
``probe``       how far a process has come, asked over HTTP
``table``       progress for a person
``supervisor``  all of it together, with a deadline
"""
