"""The decoder-only Transformer: its layers, initialisation, recomputation, calibration, and measured weight unions."""
