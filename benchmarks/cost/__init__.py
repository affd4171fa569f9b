"""What Anderson acceleration costs on real ranks: three sweeps of one measurement."""
