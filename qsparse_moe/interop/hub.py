"""A Hugging Face model by its name on the hub: its folder in the local cache, into which it is downloaded."""

from __future__ import annotations

from pathlib import Path

from qsparse_moe.data.hub_wait import log_slow_wait
from qsparse_moe.data.local_files import short
from qsparse_moe.errors import CheckpointError
from qsparse_moe.runs.find import is_hub_name

# Never a pickle, and nothing twice: folders and consolidated files repeat the weights in other formats.
_WANTED = ["*.safetensors", "*.json", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*.safetensors"]


def local_folder(name: str) -> Path:
    """Return the folder ``name``, or that of the model with this name on the hub, which is downloaded if it is missing.

    Without a network, a model in the cache is found too.

    Raises:
        CheckpointError: it is no folder, and no model on the hub that can be read.
    """
    return _download(name) if is_hub_name(name) else Path(name).expanduser()


def _download(name: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    way_out = f"hf download {name} --local-dir FOLDER on a machine with a network, and name the folder"
    try:
        with log_slow_wait(f"the files of {name} from the Hugging Face hub"):
            return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name}: is a gated model on the Hugging Face hub, and its files need a token of an account that has "
            f"accepted its terms; accept them at https://huggingface.co/{name}, and log in with hf auth login, or set "
            "HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: is neither a folder nor a public model on the Hugging Face hub, and must be one of them; correct "
            "the name, or, for a private model, log in with hf auth login, or set HF_TOKEN"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{name}: is neither a folder nor a model in the local cache of the Hugging Face hub, and the hub cannot "
            f"be reached (no network, or HF_HUB_OFFLINE is set); correct the name, or use {way_out}"
        ) from error
    except Exception as error:  # a full disk, a broken connection, a server's error: many types
        raise CheckpointError(
            f"{name}: cannot be downloaded from the Hugging Face hub ({short(error)}), and every file of the model is "
            f"needed; try again, or use {way_out}"
        ) from error
