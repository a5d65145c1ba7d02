"""Sensitivities: the change of the loss when one cell of a plan gets another sparsity, evaluated and estimated."""
