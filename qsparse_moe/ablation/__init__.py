"""Many runs that differ in a few settings, and what their differences say."""
