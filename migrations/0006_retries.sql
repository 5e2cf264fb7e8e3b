-- Creates that a client sent again because it lost the answer must find the job that the first one made.
--
-- Stock OpenAI clients retry POSTs and never send an Idempotency-Key, so a retry is known by its body's digest within a
-- short window (see store/jobs.rs); a caller who does send a key gets the exact rule.

ALTER TABLE jobs
    ADD COLUMN request_sha256   text,               -- of the body as it came, byte for byte
    ADD COLUMN idempotency_key  text UNIQUE;
CREATE INDEX jobs_request ON jobs (request_sha256, seq DESC);
