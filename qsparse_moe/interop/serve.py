"""``python -m qsparse_moe.interop.serve``: transformers' command line, which knows model type ``qsparse_moe`` here.

``transformers`` itself starts without importing this package, and it has no entry point for model types.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from qsparse_moe.errors import BackendUnavailable, QSparseMoEError
from qsparse_moe.interop.auto_model.settings import ARCHITECTURE
from qsparse_moe.interop.registration import register_config, register_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``transformers serve`` with these arguments; None: those of the process.

    Raises:
        BackendUnavailable: transformers, or what its server needs, is not installed.
    """
    check_server()
    register_config()
    register_model()
    app = import_module("transformers.cli.transformers").app
    # The server finds the class of a model as an attribute of transformers. Looked up last, because transformers
    # replaces its own module in sys.modules while its parts are imported.
    model = import_module("qsparse_moe.interop.auto_model.causal_lm").QSparseMoEForCausalLM
    setattr(sys.modules["transformers"], ARCHITECTURE, model)
    given = sys.argv[1:] if arguments is None else list(arguments)
    app(["serve", *given])


def check_server() -> None:
    """Check that transformers' server can run.

    Raises:
        BackendUnavailable: it is not installed, or the packages of its server are not.
    """
    try:
        import_module("transformers")
        available = import_module("transformers.utils.import_utils").is_serve_available()
    except ImportError:
        raise BackendUnavailable(
            'models are served by transformers, which is not installed; pip install "qsparse-moe[hf]" '
            '"transformers[serving]"'
        ) from None
    if not available:
        raise BackendUnavailable(
            "transformers serve needs fastapi, uvicorn, and openai, and not all are installed; pip install "
            '"transformers[serving]"'
        )


if __name__ == "__main__":
    try:
        main()
    except QSparseMoEError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
