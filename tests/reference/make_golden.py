"""Writes the golden files of tests/it/golden.rs with PyTorch and transformers, on the CPU.

    python tests/reference/make_golden.py tests/reference/golden

Each folder is a Hugging Face model of random f32 weights and, beside it, what PyTorch makes of it in float64:
`steps.json` (the token ids of five optimizer steps, the settings, every step's loss and gradient norm),
`gradients.safetensors` (of the first step, before clipping) and `after.safetensors` (the weights after the last step).
Documents that share a sequence are kept apart by a block-diagonal mask and by positions that restart at 0.
Rotary tables come from transformers in f32, so sequences stay within 256 tokens.
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


def build(config_path, generator):
    """The model of a config with random weights that f32 holds exactly, computed in float64."""
    config = LlamaConfig.from_json_file(config_path)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            around = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(around + 0.15 * noise)
            parameter.copy_(parameter.float())
    return model


def sequence_loss(model, documents):
    """Sum of cross entropies of a sequence of documents, and how many labels it counts."""
    ids = torch.tensor([token for document in documents for token in document])
    owner = torch.tensor([i for i, document in enumerate(documents) for _ in document])
    positions = torch.tensor([p for document in documents for p in range(len(document))])
    n = len(ids)
    visible = (owner[:, None] == owner[None, :]) & torch.ones(n, n, dtype=torch.bool).tril()
    mask = torch.zeros(n, n, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    logits = model(
        input_ids=ids[None], attention_mask=mask[None, None], position_ids=positions[None], use_cache=False
    ).logits[0]
    labels = torch.full((n,), -100)
    inner = owner[:-1] == owner[1:]
    labels[:-1][inner] = ids[1:][inner]
    assert logits.dtype == torch.float64
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), int(inner.sum())


def tensors(model, of):
    """One tensor per parameter under its Hugging Face name, in f32."""
    return {name: of(parameter).detach().float().contiguous() for name, parameter in model.named_parameters()}


def make(folder, config, shapes, seed):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generator = torch.Generator().manual_seed(seed)
    model = build(folder / "config.json", generator)
    save_file(tensors(model, lambda p: p), folder / "model.safetensors", metadata={"format": "pt"})
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
        parts = [sequence_loss(model, documents) for documents in sequences]
        loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
        loss.backward()
        if step == 0:
            save_file(tensors(model, lambda p: p.grad), folder / "gradients.safetensors")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), HYPER["max_grad_norm"])
        optimizer.step()
        steps.append({"loss": loss.item(), "grad_norm": norm.item(), "sequences": sequences})
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


if __name__ == "__main__":
    main()
