"""Small mini-batch trainings in one process: the yardstick for methods that accelerate them."""
