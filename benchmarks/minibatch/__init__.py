"""Small mini-batch trainings in one process, to compare methods that accelerate them."""
