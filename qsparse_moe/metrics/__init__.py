"""What a run writes about itself: one list of metrics, and the listener that records them as JSON lines and charts."""
