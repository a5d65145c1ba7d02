"""Routed experts: the router, its losses, the experts' weights and the backends that run them."""
