"""What a convolution is: its geometry as data, exact algebra on kernels, and running it with low-rank updates added.

This folder works on tensors and plain data and knows nothing of adapters or models. It imports only ``errors``; every
other folder may import it.
"""
