"""The command line: one verb a file, thin: parse, build, call."""
