"""Any model of this package as the transformers model type ``qsparse_moe``."""
