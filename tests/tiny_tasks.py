"""Local tasks of lm-evaluation-harness whose questions are words of the tiny models."""

from __future__ import annotations

import json
from pathlib import Path

CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
OPEN = """\
task: tiny_open
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def question(i: int) -> str:
    return " ".join(f"w{(11 * i + 3 * j) % 180}" for j in range(3 + 2 * (i % 4)))


def write_tasks(folder: Path) -> Path:
    """choice.yaml and open.yaml, on one file of eight questions."""
    folder.mkdir(parents=True)
    rows = [{"question": question(i), "choices": ["w20", "w21 w22", "w23"], "answer": i % 3} for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "choice.yaml").write_text(CHOICE)
    (folder / "open.yaml").write_text(OPEN)
    return folder
