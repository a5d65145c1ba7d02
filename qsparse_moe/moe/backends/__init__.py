"""Ways to run the stacked experts on routed rows; they hold no weights."""
