"""``python -m qsparse_moe VERB``, the same as ``qsparse-moe VERB``; the deepspeed launcher starts ranks this way."""

from qsparse_moe.cli.app import main

if __name__ == "__main__":
    main()
