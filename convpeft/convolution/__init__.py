"""What a convolution is: its geometry as data, exact algebra on kernels, and how it runs with low-rank updates beside it.

Tensors and plain data only; nothing here knows of adapters or models. Imports only ``errors``; every room may import it.
"""
