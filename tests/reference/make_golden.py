"""Writes the golden files of tests/it/golden.rs with PyTorch and transformers, on the CPU.

    python tests/reference/make_golden.py tests/reference/golden

Each folder is a Hugging Face model of random f32 weights and, beside it, what PyTorch makes of it in float64:
`steps.json` (the token ids of five optimizer steps, the settings, every step's loss and gradient norm),
`gradients.safetensors` (of the first step, before clipping) and `after.safetensors` (the weights after the last step).
Documents that share a sequence are kept apart by a block-diagonal mask and by positions that restart at 0.
Rotary tables come from transformers in f32, so documents stay within 256 tokens.

Models of BF16 have weights that bf16 holds exactly, stored in bf16, and instead of `after.safetensors` the file
`bf16.json`: how far PyTorch's own loss and gradients of the first step are from float64 when it computes them in bf16, as
people train (weights and activations in bf16; softmax, norms and cross entropy in f32).
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HYPER = {
    "learning_rate": 3e-3,
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-8,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
}
N_STEPS = 5

# name -> config as its file holds it, and the document lengths of each sequence of a step.
MODELS = {
    # Grouped queries, a tied head, the config keys of before transformers 5, two sequences of unequal length a step.
    "grouped_tied": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 131,
            "hidden_size": 32,
            "intermediate_size": 72,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "torch_dtype": "float32",
        },
        [[97], [41]],
    ),
    # Llama 3 frequencies whose three bands all occur, a head of its own, heads wider than hidden size over heads,
    # the config keys of transformers 5, three documents packed into one sequence.
    "llama3_rope_untied": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 120,
            "hidden_size": 40,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": "float32",
        },
        [[117, 5, 78]],
    ),
}
# Heads of 64, which the attention of GPUs takes; more than one block of 128 keys, documents that fill their blocks unevenly.
BF16 = {
    "heads_of_64": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 320,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": "bfloat16",
        },
        [[203, 9, 88]],
    ),
}


def build(config_path, generator, held_in, deviation):
    """The model of a config with random weights that a type holds exactly, computed in float64."""
    config = LlamaConfig.from_json_file(config_path)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            around = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(around + deviation * noise)
            parameter.copy_(parameter.to(held_in))
    return model


def in_bf16(config_path, exact):
    """The same model computed in bf16, its rotary frequencies in f32 as transformers keeps them."""
    config = LlamaConfig.from_json_file(config_path)
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(exact.state_dict())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.bfloat16()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    return model


def sequence_loss(model, documents):
    """Sum of cross entropies of a sequence of documents, and how many labels it counts."""
    ids = torch.tensor([token for document in documents for token in document])
    owner = torch.tensor([i for i, document in enumerate(documents) for _ in document])
    positions = torch.tensor([p for document in documents for p in range(len(document))])
    n = len(ids)
    visible = (owner[:, None] == owner[None, :]) & torch.ones(n, n, dtype=torch.bool).tril()
    dtype = model.lm_head.weight.dtype
    mask = torch.zeros(n, n, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    logits = model(
        input_ids=ids[None], attention_mask=mask[None, None], position_ids=positions[None], use_cache=False
    ).logits[0]
    labels = torch.full((n,), -100)
    inner = owner[:-1] == owner[1:]
    labels[:-1][inner] = ids[1:][inner]
    assert logits.dtype == dtype
    logits = logits.float() if dtype == torch.bfloat16 else logits
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), int(inner.sum())


def tensors(model, of, dtype=torch.float32):
    """One tensor per parameter under its Hugging Face name."""
    return {name: of(parameter).detach().to(dtype).contiguous() for name, parameter in model.named_parameters()}


def mean_loss(model, sequences):
    parts = [sequence_loss(model, documents) for documents in sequences]
    return sum(part for part, _ in parts) / sum(count for _, count in parts)


def bf16_errors(config_path, exact, sequences):
    """Relative errors of loss and gradients of `exact` when PyTorch computes them in bf16; its gradients are there."""
    model = in_bf16(config_path, exact)
    loss = mean_loss(model, sequences)
    loss.backward()
    ours = dict(model.named_parameters())
    error = lambda name, p: ((ours[name].grad.double() - p.grad).norm() / p.grad.norm()).item()
    exact_loss = mean_loss(exact, sequences).item()
    return {
        "loss": abs(loss.item() - exact_loss) / exact_loss,
        "gradients": {name: error(name, p) for name, p in exact.named_parameters()},
    }


def make(folder, config, shapes, seed, in_bf16=False):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generator = torch.Generator().manual_seed(seed)
    held_in = torch.bfloat16 if in_bf16 else torch.float32
    model = build(folder / "config.json", generator, held_in, 0.06 if in_bf16 else 0.15)
    save_file(tensors(model, lambda p: p, held_in), folder / "model.safetensors", metadata={"format": "pt"})
    decayed = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": HYPER["weight_decay"]}, {"params": gains, "weight_decay": 0.0}],
        lr=HYPER["learning_rate"],
        betas=(HYPER["beta1"], HYPER["beta2"]),
        eps=HYPER["epsilon"],
    )
    steps = []
    for step in range(N_STEPS):
        sequences = [
            [torch.randint(config["vocab_size"], (length,), generator=generator).tolist() for length in lengths]
            for lengths in shapes
        ]
        optimizer.zero_grad()
        loss = mean_loss(model, sequences)
        loss.backward()
        if step == 0:
            save_file(tensors(model, lambda p: p.grad), folder / "gradients.safetensors")
        if step == 0 and in_bf16:
            errors = bf16_errors(folder / "config.json", model, sequences)
            (folder / "bf16.json").write_text(json.dumps(errors, indent=2) + "\n")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), HYPER["max_grad_norm"])
        optimizer.step()
        steps.append({"loss": loss.item(), "grad_norm": norm.item(), "sequences": sequences})
    if not in_bf16:
        save_file(tensors(model, lambda p: p), folder / "after.safetensors")
    made_by = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    text = json.dumps({"made_by": made_by, **HYPER, "steps": steps}, separators=(",", ":"))
    (folder / "steps.json").write_text(text + "\n")
    print(folder.name, [round(step["loss"], 6) for step in steps], [round(step["grad_norm"], 4) for step in steps])


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for seed, (name, (config, shapes)) in enumerate(MODELS.items(), start=1):
        make(Path(sys.argv[1]) / name, config, shapes, seed)
    for seed, (name, (config, shapes)) in enumerate(BF16.items(), start=100):
        make(Path(sys.argv[1]) / name, config, shapes, seed, in_bf16=True)


if __name__ == "__main__":
    main()
