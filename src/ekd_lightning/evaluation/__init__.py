"""How good, how diverse and how expensive a network is."""
