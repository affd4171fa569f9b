"""How ranks talk: one seam (`base.Communicator`) and what stands behind it."""
