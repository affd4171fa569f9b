"""The algorithm: knows neither torch.optim nor Horovod."""
