"""Trained models in files that other programs open, and back; owner of safetensors and of transformers' checkpoints.

``import qsparse_moe.interop`` registers model type ``qsparse_moe`` with transformers.
"""

from qsparse_moe.interop.registration import register_when_imported

register_when_imported()
