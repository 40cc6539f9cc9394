"""Student and teacher on the mesh, and where their decoders meet the loss."""
