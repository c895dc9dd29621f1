"""Teachers: frozen copies, tables of their outputs, the store, and the source of outputs for training."""
