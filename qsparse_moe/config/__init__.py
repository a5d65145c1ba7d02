"""Settings of a run: schema, loading, rules. Imports no torch."""
