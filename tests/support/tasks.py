"""Tasks of lm-evaluation-harness on local files: multiple choice, generated text, and the perplexity of a text."""

from __future__ import annotations

import json
from pathlib import Path

CHOICES = [
    {"question": "two and two", "choices": [" three", " four", " 22"], "answer": 1},
    {"question": "the sky is", "choices": [" blue", " a long wrong answer"], "answer": 0},
    {"question": "größe", "choices": [" x", "y", " zz", " ööö"], "answer": 3},
    {"question": "a token", "choices": [" no", " yes"], "answer": 0},
    {"question": "an expert", "choices": [" 1", " 2"], "answer": 1},
]
TEXTS = [{"text": "sparse experts"}, {"text": "a text that is longer than the model reads at once, by far" * 3}]

_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
{rest}
metadata: {{version: 3}}
"""
_REST = {
    "local_choice": """
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{question}}:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "local_generation": """
output_type: generate_until
doc_to_text: "{{question}}:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "local_perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
}


def write_tasks(folder: Path) -> Path:
    """Write one YAML file per task, and their data."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rest in _REST.items():
        file = folder / f"{name}.jsonl"
        documents = TEXTS if name == "local_perplexity" else CHOICES
        file.write_text("".join(json.dumps(one) + "\n" for one in documents))
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name, file=file, rest=rest))
    return folder
