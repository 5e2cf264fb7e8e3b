-- What a project may use, and how often a key may ask. NULL is without limit.

ALTER TABLE projects
    ADD COLUMN max_stored_bytes    bigint CHECK (max_stored_bytes >= 0),     -- of files, and of uploads as they were promised
    ADD COLUMN max_jobs            bigint CHECK (max_jobs >= 0),             -- that have not ended
    ADD COLUMN max_tokens_per_day  bigint CHECK (max_tokens_per_day >= 0),   -- trained by jobs that began in the last 24 hours
    ADD COLUMN max_tokens          bigint CHECK (max_tokens >= 0);           -- trained by all jobs
ALTER TABLE api_keys ADD COLUMN requests_per_minute int CHECK (requests_per_minute > 0);
