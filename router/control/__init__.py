"""Routes beside inference: for operators, instances and people who look. In dependency order:

``fan_out``       one question to many instances
``fleet``         health, metrics, and what goes to all instances: flush, abort
``everywhere``    SGLang's routes that change an instance: all of them
``registration``  instances that come and go, workers an operator adds, the tree
``drain``         an instance that is to leave
``workers``       one worker's role and end
``explain``       why requests go where they go
``aliases``       the same by the names of sglang-router and SGLang
``methods``       other methods on all of these
``openapi``       what the router says of itself
"""
