"""What Anderson acceleration costs on one GPU, by part and in a network's training step."""
