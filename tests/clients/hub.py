"""Loads a fine-tuned model by name with Hugging Face's own clients, and prints what came as one line of JSON.

    HF_ENDPOINT=http://host:port/hf HF_TOKEN=<key> HF_HOME=<empty folder> python hub.py <repository> <revision>
"""

import hashlib
import json
import os
import sys

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def digests(folder):
    files = {}
    for base, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(base, name)
            with open(path, "rb") as file:
                files[os.path.relpath(path, folder)] = hashlib.sha256(file.read()).hexdigest()
    return files


def error_of(call):
    try:
        call()
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        return type(error).__name__
    return None


repository, revision = sys.argv[1:]
config = AutoConfig.from_pretrained(repository)
tokenizer = AutoTokenizer.from_pretrained(repository)
model = AutoModelForCausalLM.from_pretrained(repository)
# A second time everything is there: only the repository is asked about.
again = AutoModelForCausalLM.from_pretrained(repository)
earlier = AutoModelForCausalLM.from_pretrained(repository, revision=revision)
info = HfApi().model_info(repository)
print(
    json.dumps(
        {
            "main": digests(snapshot_download(repository)),
            "revision": digests(snapshot_download(repository, revision=revision)),
            "commit": digests(snapshot_download(repository, revision=info.sha)),
            "listed": sorted(HfApi().list_repo_files(repository)),
            "sizes": {entry.path: entry.size for entry in HfApi().list_repo_tree(repository)},
            "vocabulary": [config.vocab_size, len(tokenizer)],
            "parameters": model.num_parameters(),
            "same": all(bool((a == b).all()) for a, b in zip(model.parameters(), again.parameters())),
            "differ": any(bool((a != b).any()) for a, b in zip(model.parameters(), earlier.parameters())),
            "errors": [
                error_of(lambda: hf_hub_download(repository, "absent.json")),
                error_of(lambda: hf_hub_download(repository, "config.json", revision="step-999999")),
                error_of(lambda: hf_hub_download(repository + "x", "config.json")),
            ],
        }
    )
)
