"""The product of sparse rows with a matrix of which only the rows behind their nonzero features are read."""
