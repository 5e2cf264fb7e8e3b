"""Compares conversations as the engine tokenizes and masks them with what transformers makes of them.

    python tests/reference/check_chat.py CASES

CASES is a JSON list of objects: `folder` (of a tokenizer with a chat template), `line` (with messages and perhaps tools),
`ids` and `trained` (one number a token, 1 where a loss counts it), as the engine has them. Where the template marks what the
assistant generates, the mask is transformers' own; elsewhere it is made here from renderings of the beginnings.
"""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer


def plain(messages):
    """Without what is ours, and with arguments of calls as objects, which is what templates want."""
    out = []
    for message in messages:
        message = {key: value for key, value in message.items() if key != "weight"}
        for call in message.get("tool_calls") or []:
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        out.append(message)
    return out


def by_beginnings(tokenizer, messages, weights, tools):
    def render(n, prompt):
        return tokenizer.apply_chat_template(messages[:n], tools=tools, tokenize=False, add_generation_prompt=prompt)

    text = render(len(messages), False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and weights[i]:
            begin, end = render(i, True), render(i + 1, False)
            assert text.startswith(end) and end.startswith(begin)
            spans.append((len(begin), len(end)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(a < end and b > start for start, end in spans)) for a, b in encoded["offset_mapping"]]
    return encoded["input_ids"], mask


def main():
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for case in cases:
        tokenizer = AutoTokenizer.from_pretrained(case["folder"])
        line = case["line"]
        messages, tools = plain(line["messages"]), line.get("tools")
        weights = [message.get("weight", 1) for message in line["messages"]]
        whole = tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
        )
        assert whole["input_ids"] == case["ids"], f"ids of {line}:\n{whole['input_ids']}\n{case['ids']}"
        if "endgeneration" in tokenizer.chat_template:
            assert all(weights), "transformers knows no weights"
            mask = whole["assistant_masks"]
        else:
            ids, mask = by_beginnings(tokenizer, messages, weights, tools)
            assert ids == case["ids"]
        assert mask == case["trained"], f"mask of {line}:\n{mask}\n{case['trained']}"
    print(json.dumps({"cases": len(cases), "tokens": sum(len(case["ids"]) for case in cases)}))


if __name__ == "__main__":
    main()
