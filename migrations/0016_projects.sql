-- Projects, to which everything belongs, and the keys that act for them.
--
-- What was there before belongs to the default project, which is also the one of a server without any key. The default of
-- project_id stays: a server of an earlier version that still runs beside this one names no project, and knows of one only.
-- A constant default rewrites no table.

CREATE TABLE projects (
    id          text PRIMARY KEY,
    seq         bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    name        text NOT NULL UNIQUE,
    created_at  timestamptz NOT NULL DEFAULT now()
);
INSERT INTO projects (id, name) VALUES ('proj_default', 'default');

-- Rows of keys stay when they are revoked: as long as one is there, every request needs a key.
CREATE TABLE api_keys (
    id            text PRIMARY KEY,
    seq           bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    project_id    text NOT NULL REFERENCES projects,
    name          text NOT NULL,
    sha256        text NOT NULL UNIQUE,               -- of the whole key, hex; the key itself is nowhere
    hint          text NOT NULL,                      -- its last characters, by which its owner knows it
    scope         text NOT NULL CHECK (scope IN ('read', 'write', 'admin')),
    created_at    timestamptz NOT NULL DEFAULT now(),
    expires_at    timestamptz,
    revoked_at    timestamptz,
    last_used_at  timestamptz                         -- to the minute
);

ALTER TABLE files ADD COLUMN project_id text NOT NULL DEFAULT 'proj_default' REFERENCES projects;
ALTER TABLE uploads ADD COLUMN project_id text NOT NULL DEFAULT 'proj_default' REFERENCES projects;
ALTER TABLE jobs ADD COLUMN project_id text NOT NULL DEFAULT 'proj_default' REFERENCES projects;
ALTER TABLE plans ADD COLUMN project_id text NOT NULL DEFAULT 'proj_default' REFERENCES projects;
ALTER TABLE webhooks ADD COLUMN project_id text NOT NULL DEFAULT 'proj_default' REFERENCES projects;
CREATE INDEX files_project ON files (project_id, seq);
CREATE INDEX uploads_project ON uploads (project_id, seq);
CREATE INDEX jobs_project ON jobs (project_id, seq);
CREATE INDEX checkpoint_permissions_project ON checkpoint_permissions (project_id);

-- Two projects may use the same idempotency key, or send the same body.
ALTER TABLE jobs DROP CONSTRAINT jobs_idempotency_key_key;
CREATE UNIQUE INDEX jobs_idempotency_key ON jobs (project_id, idempotency_key);
DROP INDEX jobs_request;
CREATE INDEX jobs_request ON jobs (project_id, request_sha256, seq DESC);

CREATE OR REPLACE FUNCTION jobs_tell_webhooks() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO webhook_messages (id, webhook_id, event, job_id)
    SELECT 'evt_' || replace(gen_random_uuid()::text, '-', ''), id, 'fine_tuning.job.' || NEW.status, NEW.id
    FROM webhooks WHERE project_id = NEW.project_id AND 'fine_tuning.job.' || NEW.status = ANY (events);
    RETURN NULL;
END $$;
