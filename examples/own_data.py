"""Train on your own text with your own tokenizer.

    python examples/own_data.py --text "corpus/*.txt" --vocab-size 2000 --steps 200

The script trains a byte-level BPE tokenizer with the ``tokenizers`` library, saves it where ``data.tokenizer`` can find
it, and trains a small model on the text with it.
"""

from __future__ import annotations

import argparse
import glob
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qsparse_moe import load_config, train
from qsparse_moe.config.shipped import shipped
from qsparse_moe.metrics.recorder import Recorder


def train_tokenizer(files: list[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer on ``files`` and save it in ``folder``, as Hugging Face tokenizers are saved."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The data needs one special token, which separates documents.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(files, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}\n')


def main() -> None:
    """Parse the command line, train the tokenizer, and train the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="text files, as a glob in quotes")
    parser.add_argument("--vocab-size", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--name", default="own-data", help="name of the run folder below runs/")
    parser.add_argument("overrides", nargs="*", help="further settings, such as data.sequence_length=64")
    arguments = parser.parse_args()
    files = sorted(glob.glob(arguments.text, recursive=True))
    if not files:
        parser.error(f"--text {arguments.text!r} matches no file")
    tokenizer = Path("tokenizers") / arguments.name
    train_tokenizer(files, arguments.vocab_size, tokenizer)
    config = load_config(
        shipped("tiny").path,
        [
            f"data.tokenizer={tokenizer}",
            f'data.sources=[{{kind: text, path: "{arguments.text}"}}]',
            f"training.name={arguments.name}",
            f"training.steps={arguments.steps}",
            "training.engine=torch",
            *arguments.overrides,
        ],
    )
    result = train(config, listeners=(Recorder(config),))
    assert result.validation is not None
    print(f"{result.step} steps, {result.validation['bits_per_byte']:.3f} bits per byte on held-out documents")
    print(f"qsparse-moe generate {result.run_dir} --prompt 'Once'")


if __name__ == "__main__":
    main()
