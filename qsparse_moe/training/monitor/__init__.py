"""What a run watches while it trains: non-finite values, dead experts, time, memory, and gradients."""
