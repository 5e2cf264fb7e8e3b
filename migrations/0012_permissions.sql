-- Projects to which a checkpoint was opened. Kept and told; they go with their checkpoint.

CREATE TABLE checkpoint_permissions (
    id             text PRIMARY KEY,
    seq            bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    checkpoint_id  text NOT NULL REFERENCES checkpoints ON DELETE CASCADE,
    project_id     text NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT now(),
    UNIQUE (checkpoint_id, project_id)
);
