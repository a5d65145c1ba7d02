"""Train an exported model on text files with transformers' Trainer, save it, and generate with it.

    qsparse-moe export runs/tiny --output exported
    python examples/in_transformers.py exported --text "corpus/*.txt" --output tuned
    qsparse-moe import tuned --output imported

It needs transformers and accelerate: pip install "qsparse-moe[hf]" accelerate
"""

from __future__ import annotations

import argparse
from glob import glob
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)

import qsparse_moe.interop  # noqa: F401  registers the model type
from qsparse_moe.interop.auto_model.schedule import ScheduleCallback


def main() -> None:
    """Train, save, and generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="an export")
    parser.add_argument("--text", required=True, help="text files, such as 'corpus/*.txt'")
    parser.add_argument("--output", default="tuned")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    # Padding is masked in attention and left out of every loss, so any token will do.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [Path(path).read_text(encoding="utf-8") for path in sorted(glob(arguments.text))]
    rows = [tokenizer(text, truncation=True, max_length=arguments.length) for text in texts]
    model = AutoModelForCausalLM.from_pretrained(arguments.folder)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=arguments.output,
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=max(1, arguments.steps // 5),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[ScheduleCallback()],
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {entry['loss']:.3f}")
    trainer.save_model(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    generate = pipeline("text-generation", model=arguments.output)
    print(generate(texts[0][:20], max_new_tokens=20, do_sample=False)[0]["generated_text"])


if __name__ == "__main__":
    main()
