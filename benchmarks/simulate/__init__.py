"""Predicts what Anderson acceleration costs on machines larger than this one."""
