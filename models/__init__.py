"""Image-classification training on Horovod ranks, with and without Anderson acceleration.

Run ``python -m models.train --help`` for the training program and ``python -m models.demo`` for
the comparison on real images that needs no download.
"""
