"""Communication between ranks: one interface, `base.Communicator`, and its implementations."""
