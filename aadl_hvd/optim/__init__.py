"""Torch optimizers: the accelerated ones, and a torch optimizer as a fixed-point iteration."""
