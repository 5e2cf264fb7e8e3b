"""Loads a checkpoint with transformers and compares what it computes with what the engine computed.

    python tests/reference/check_transformers.py CHECKPOINT TEXT OURS

CHECKPOINT is a Hugging Face folder, TEXT a UTF-8 file, OURS a JSON file of the engine: `ids` (the text's token ids, with
begin and end tokens), `logits` (a file of little-endian f32, one row of the vocabulary per token) and `loss` (mean cross
entropy of every token after the first). Prints the differences as JSON; exits with 1 where one is larger than 1e-5.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-5


def main():
    checkpoint, text, ours = map(Path, sys.argv[1:])
    ours = json.loads(ours.read_text())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    plain = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    ids = [tokenizer.bos_token_id, *plain, tokenizer.eos_token_id]
    assert ids == ours["ids"], f"token ids differ: {len(ids)} against {len(ours['ids'])}"

    model, report = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    faults = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(faults.values()), f"the checkpoint does not load whole: {faults}"
    model.eval()
    tokens = torch.tensor([ids])
    with torch.no_grad():
        output = model(input_ids=tokens, labels=tokens)
    logits = output.logits[0]
    values = torch.frombuffer(bytearray(Path(ours["logits"]).read_bytes()), dtype=torch.float32)
    engine = values.reshape(logits.shape)
    differences = {
        "logits": ((logits - engine).norm() / logits.norm()).item(),
        "worst_row": ((logits - engine).norm(dim=-1) / logits.norm(dim=-1)).max().item(),
        "loss": abs(output.loss.item() - ours["loss"]) / output.loss.item(),
    }
    print(json.dumps({"tokens": len(ids), **differences}))
    sys.exit(0 if all(difference <= TOLERANCE for difference in differences.values()) else 1)


if __name__ == "__main__":
    main()
