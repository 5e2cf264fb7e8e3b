"""OpenAI's own package through the life of a file, a job and a model; prints what came as one line of JSON.

    OPENAI_BASE_URL=http://host:port/v1 OPENAI_API_KEY=<key> HF_TOKEN=<key> HF_ENDPOINT=http://host:port/hf HF_HOME=<empty folder> \
        python openai.py <base model> <document>
"""

import sys

sys.path.pop(0)  # This script has the package's name, and its folder is looked through first.

import hashlib
import http.server
import json
import pathlib
import threading
import time

import openai
from openai import OpenAI

client = OpenAI()
base_model, document = sys.argv[1], pathlib.Path(sys.argv[2])
content = document.read_bytes()


def until(what, look):
    for _ in range(2400):
        found = look()
        if found:
            return found
        time.sleep(0.1)
    raise TimeoutError(what)


def refused(kind, call):
    """The error that a call ends in."""
    try:
        call()
    except kind as error:
        assert error.request_id, error
        return error
    raise AssertionError(f"{kind.__name__} was expected")


# A receiver of webhooks.
class Receiver(http.server.BaseHTTPRequestHandler):
    got = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        Receiver.got.append((dict(self.headers), body))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments):
        pass


listener = http.server.HTTPServer(("127.0.0.1", 0), Receiver)
threading.Thread(target=listener.serve_forever, daemon=True).start()
endpoint = client.webhooks.create(
    name="journey",
    url=f"http://127.0.0.1:{listener.server_port}/hook",
    event_types=["fine_tuning.job.succeeded"],
)

# The document, in parts.
upload = client.uploads.upload_file_chunked(
    file=document,
    mime_type="text/plain",
    purpose="fine-tune",
    part_size=5000,
    md5=hashlib.md5(content).hexdigest(),
)
assert upload.status == "completed" and upload.file.status == "processed", upload
file = client.files.retrieve(upload.file.id)
assert client.files.content(file.id).read() == content
assert [listed.id for listed in client.files.list(purpose="fine-tune", limit=1)].count(file.id) == 1
# One that is given up.
other = client.uploads.create(filename="a.txt", purpose="fine-tune", bytes=10, mime_type="text/plain")
part = client.uploads.parts.create(other.id, data=b"hello")
assert part.upload_id == other.id
assert client.uploads.cancel(other.id).status == "cancelled"
refused(openai.ConflictError, lambda: client.uploads.complete(other.id, part_ids=[part.id]))


def create(suffix, steps):
    return client.fine_tuning.jobs.create(
        model=base_model,
        training_file=file.id,
        validation_file=file.id,
        suffix=suffix,
        seed=7,
        metadata={"suffix": suffix},
        method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 1}}},
        extra_body={
            "training": {
                "sequence_length": 512,
                "long_documents": "split",
                "max_steps": steps,
                "checkpoint_interval": 8,
                "evaluation_interval": steps,
            }
        },
    )


error = refused(
    openai.BadRequestError,
    lambda: client.fine_tuning.jobs.create(
        model=base_model, training_file=file.id, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}
    ),
)
assert error.param == "method.type", error
until("the model to be published", lambda: base_model in [model.id for model in client.models.list()])
job = create("python", 24)
jobs = client.fine_tuning.jobs


def follow(last_seen, enough):
    """Events as they happen, by the connection pool of the client itself, until `enough` says so or the job has ended."""
    headers = {"accept": "text/event-stream", **client.auth_headers}
    if last_seen:
        headers["last-event-id"] = last_seen
    with client._client.stream("GET", f"{client.base_url}fine_tuning/jobs/{job.id}/events", headers=headers) as answer:
        assert answer.status_code == 200, answer
        for line in answer.iter_lines():
            if line.startswith("data:") and line[5:].strip().startswith("{"):
                event = json.loads(line[5:])
                seen.append(event)
                last_seen = event["id"]
                if enough(event):
                    break
    return last_seen


def step(event):
    return (event.get("data") or {}).get("step") or 0


seen = []
last = follow(None, lambda event: step(event) >= 4)
jobs.pause(job.id)
until("the pause", lambda: jobs.retrieve(job.id).status == "paused")
assert jobs.resume(job.id).status in ("queued", "running")
follow(last, lambda event: False)
job = jobs.retrieve(job.id)
assert job.status == "succeeded", job
# No event was missed and none came twice, over the pause and the second connection.
listed = [event.id for event in jobs.list_events(job.id, limit=7)]
assert [event["id"] for event in seen] == listed[::-1], (seen, listed)
assert [found.id for found in jobs.list(extra_query={"metadata[suffix]": "python"})] == [job.id]

# Another, cancelled.
cancelled = create("cancelled", 100000)
jobs.cancel(cancelled.id)
until("the cancellation", lambda: jobs.retrieve(cancelled.id).status == "cancelled")
error = refused(openai.ConflictError, lambda: jobs.pause(cancelled.id))
assert error.code == "job_ended", error

# What came of the first.
csv = client.files.content(job.result_files[0]).read().decode()
assert client.files.retrieve(job.result_files[0]).purpose == "fine-tune-results"
checkpoints = list(jobs.checkpoints.list(job.id, limit=1))
assert checkpoints[0].fine_tuned_model_checkpoint == job.fine_tuned_model, checkpoints
assert {checkpoint.step_number for checkpoint in checkpoints} >= {8, 16, 24}, checkpoints
permissions = client.fine_tuning.checkpoints.permissions
made = permissions.create(job.fine_tuned_model, project_ids=["proj_a", "proj_b"])
assert len(made.data) == 2
assert len(list(permissions.list(job.fine_tuned_model, limit=1, order="ascending"))) == 2
gone = permissions.delete(made.data[0].id, fine_tuned_model_checkpoint=job.fine_tuned_model)
assert gone.deleted, gone

headers, body = until("the webhook", lambda: Receiver.got and Receiver.got[0])
webhook = client.webhooks.unwrap(body, headers, secret=endpoint.signing_secret)
refused_signature = None
try:
    client.webhooks.unwrap(body + " ", headers, secret=endpoint.signing_secret)
except openai.InvalidWebhookSignatureError as error:
    refused_signature = error
assert refused_signature, "a forged body was accepted"
assert client.webhooks.delete(endpoint.id).deleted

from transformers import AutoModelForCausalLM  # noqa: E402  Slow to import, and only wanted here.

repository = client.models.retrieve(job.fine_tuned_model).model_extra["hub"]["repository"]
model = AutoModelForCausalLM.from_pretrained(repository)

# The end of it all.
assert client.models.delete(job.fine_tuned_model).deleted
refused(openai.NotFoundError, lambda: client.models.retrieve(job.fine_tuned_model))
assert client.files.delete(file.id).deleted
refused(openai.NotFoundError, lambda: client.files.retrieve(file.id))

print(
    json.dumps(
        {
            "file_sha256": file.model_extra["sha256"],
            "job": job.id,
            "model": job.fine_tuned_model,
            "cancelled": cancelled.id,
            "csv": csv,
            "parameters": model.num_parameters(),
            "webhook": webhook.to_dict(),
        }
    )
)
