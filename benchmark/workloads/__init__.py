"""Workloads: what clients ask, when, and what must have been answered before.

    request    Turn and Workload, and the JSONL they are written in
    words      English-looking text from a seed
    chat       conversations of several turns behind one system prompt
    sharegpt   conversations that people had
    react      agents: a long preamble, then thought, action and observation in turns
    documents  questions about long documents, by several clients each
    programs   what SGLang frontend programs send: few-shot, tree of thought
    control    prompts that share nothing
    registry   all of them by name

A workload is a pure function of its seed (and of the files it is given): the same requests for
every set-up. Sizes suit a model of 135M parameters on two cores, and say so where they are chosen.
"""
