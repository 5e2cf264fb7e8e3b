-- What the executors have. The API plans and refuses against hosts seen lately; the row of a dead executor grows old.

CREATE TABLE hosts (
    executor_id  text PRIMARY KEY,
    hostname     text NOT NULL,
    version      text NOT NULL,
    machines     jsonb NOT NULL,                    -- [domain::Machine]: one for the CPU, one for the GPUs
    models       jsonb NOT NULL DEFAULT '[]',       -- [domain::BaseModel]: what its model folder holds
    started_at   timestamptz NOT NULL DEFAULT now(),
    seen_at      timestamptz NOT NULL DEFAULT now()
);
