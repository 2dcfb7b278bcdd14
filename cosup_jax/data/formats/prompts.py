"""Prompts that others wrote: `{instruction}## Input:\\n\\n{question}## Output:\\n\\n`, taken apart.

`markup` words its own instruction for a task. An imported instruction that says no more than that
names the task and is dropped; any other stays a part of the question.
"""

import re

INPUT, OUTPUT = "## Input:", "## Output:"

_TASKS = {  # the first whose pattern an instruction begins with counts
    "fact_check": r"is the following (statement|claim) ",
    "slot_filling": r"find the correct (entity|object) given|given the input format .*relation",
    "dialog": r"given a (chat|dialog)",
    "multi_hop": r"answer (the )?(following )?questions?\b.*(reasoning step|step reasoning)",
    "long_form": r"provide a paragraph-length|answer the following question\..*long-form",
    "open_qa": r"(answer the (following )?question( with corresponding evidence)?[.:]?)?$",
}


def is_framed(prompt: str) -> bool:
    """Whether `split` tells instruction and question apart."""
    return INPUT in prompt


def split(prompt: str) -> tuple[str, str]:
    """(task, question); a prompt without the frame is all question, of task open_qa."""
    instruction, _, question = prompt.partition(INPUT) if is_framed(prompt) else ("", "", prompt)
    body, end, after = question.rpartition(OUTPUT)
    question = (body if end and not after.strip() else question).strip()
    instruction = re.sub(r"\n#$", "", instruction).strip()  # Self-RAG also writes ### Input:
    for task, pattern in _TASKS.items():
        if re.match(pattern, instruction, re.I | re.S):
            return task, question
    return "open_qa", f"{instruction}\n\n{question}" if question else ""
