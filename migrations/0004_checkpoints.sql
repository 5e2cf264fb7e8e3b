-- Checkpoints that can be downloaded, and the models they make. Bytes live in the object store under
-- checkpoints/<checkpoint id>/<path>. A row exists only for bytes that are complete: there is no half checkpoint to see.

CREATE TABLE checkpoints (
    id           text PRIMARY KEY,
    seq          bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    job_id       text NOT NULL REFERENCES jobs ON DELETE CASCADE,
    step         bigint NOT NULL,
    epoch        bigint NOT NULL,                   -- attempt that wrote it
    model_name   text NOT NULL UNIQUE,              -- ft:<base>:<org>:<suffix>:<short id>[:ckpt-step-<n>]
    last         boolean NOT NULL,                  -- the job's result
    metrics      jsonb NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    UNIQUE (job_id, step)
);

CREATE TABLE checkpoint_files (
    checkpoint_id  text NOT NULL REFERENCES checkpoints ON DELETE CASCADE,
    path           text NOT NULL,
    bytes          bigint NOT NULL,
    sha256         text NOT NULL,
    resume         boolean NOT NULL,                -- state for continuing the run; not part of the model
    PRIMARY KEY (checkpoint_id, path)
);
