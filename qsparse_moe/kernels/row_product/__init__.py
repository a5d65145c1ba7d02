"""The product of sparse rows with a matrix, which reads only the matrix rows behind nonzero features."""
