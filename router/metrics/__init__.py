"""What is counted, in Prometheus' terms. In dependency order:

``labels``    values that others choose, bounded in number
``registry``  what the router counts
``gauges``    what is read when somebody asks
``engine``    the instances' own metrics as one page
"""
