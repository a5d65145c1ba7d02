"""Routed experts: the router and its losses, the weights of the experts, dispatch, and the backends that run them."""
