"""Trains a model with PyTorch and transformers on given sequences, once in bf16 and once in f32, and tells the losses.

    python tests/reference/twenty_steps.py MODEL STEPS

MODEL is a Hugging Face folder with f32 weights. STEPS is a JSON file: `device` (cpu or cuda), the settings of AdamW
(`learning_rate`, `beta1`, `beta2`, `epsilon`, `weight_decay`, `max_grad_norm`), and `sequences`, the token ids of each step.

bf16 means: weights, activations and gradients in bf16, attention by PyTorch's scaled_dot_product_attention; masters and
moments in f32, the weights being the masters rounded after every update. Norm gains are not decayed.
Prints one JSON object: `bf16` and `f32`, the losses before each update, and what they were computed with.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM


def load(folder, dtype, device):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)
    # Rounded to bf16, positions would be wrong by whole turns.
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    model.train()
    return model


def train(folder, job, dtype):
    """Losses of every step."""
    device = job["device"]
    model = load(folder, dtype, device)
    weights = dict(model.named_parameters())
    exact = dict(load(folder, torch.float32, device).named_parameters())
    masters = {name: torch.nn.Parameter(exact[name].detach().clone()) for name in weights}
    decayed = [p for p in masters.values() if p.dim() > 1]
    gains = [p for p in masters.values() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": job["weight_decay"]}, {"params": gains, "weight_decay": 0.0}],
        lr=job["learning_rate"],
        betas=(job["beta1"], job["beta2"]),
        eps=job["epsilon"],
    )
    losses = []
    for ids in job["sequences"]:
        tokens = torch.tensor([ids], device=device)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        for name, weight in weights.items():
            masters[name].grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters.values(), job["max_grad_norm"])
        optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(masters[name])
    return losses


def main():
    folder, job = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    torch.backends.cuda.matmul.allow_tf32 = False
    card = torch.cuda.get_device_name() if job["device"] == "cuda" else "cpu"
    made_by = {"torch": torch.__version__, "transformers": transformers.__version__, "on": card}
    losses = {"bf16": train(folder, job, torch.bfloat16), "f32": train(folder, job, torch.float32)}
    print(json.dumps({**losses, "made_by": made_by}))


if __name__ == "__main__":
    main()
