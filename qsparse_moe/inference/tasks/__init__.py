"""Tasks of lm-evaluation-harness on the models of this package."""
