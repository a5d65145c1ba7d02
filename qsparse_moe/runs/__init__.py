"""The run folder, its manifest, and the reports of training: what training writes and other packages read."""
